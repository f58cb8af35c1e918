"""Immich's machine learning service: `image` -> embedding, `text` int32 -> embedding, one of each at a time.

It reads the first output's first row, cuts and pads texts itself (end token kept), and never normalises. Models are
known by name: what is not on its list is not loaded, and its database expects the list's number of dimensions.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.edits import NarrowIds, RenameInput
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack
from d4c_onnx.untrusted_json import short

# Dimensions -> the models of its list (autumn 2026) that are CLIPs of open_clip.
_KNOWN = {
    512: (
        "RN101__openai RN101__yfcc15m ViT-B-16__laion400m_e31 ViT-B-16__laion400m_e32 ViT-B-16__openai "
        "ViT-B-32__laion2b-s34b-b79k ViT-B-32__laion2b_e16 ViT-B-32__laion400m_e31 ViT-B-32__laion400m_e32 "
        "ViT-B-32__openai XLM-Roberta-Base-ViT-B-32__laion5b_s13b_b90k"
    ),
    640: "RN50x4__openai ViT-B-16-plus-240__laion400m_e31 ViT-B-16-plus-240__laion400m_e32",
    768: (
        "RN50x16__openai ViT-B-16-SigLIP-256__webli ViT-B-16-SigLIP-384__webli ViT-B-16-SigLIP-512__webli "
        "ViT-B-16-SigLIP-i18n-256__webli ViT-B-16-SigLIP__webli ViT-B-16-SigLIP2__webli ViT-B-32-SigLIP2-256__webli "
        "ViT-L-14-336__openai ViT-L-14-quickgelu__dfn2b ViT-L-14__laion2b-s32b-b82k ViT-L-14__laion400m_e31 "
        "ViT-L-14__laion400m_e32 ViT-L-14__openai nllb-clip-base-siglip__mrl nllb-clip-base-siglip__v1"
    ),
    1024: (
        "RN50__cc12m RN50__openai RN50__yfcc15m RN50x64__openai ViT-H-14-378-quickgelu__dfn5b "
        "ViT-H-14-quickgelu__dfn5b ViT-H-14__laion2b-s32b-b79k ViT-L-16-SigLIP-256__webli ViT-L-16-SigLIP-384__webli "
        "ViT-L-16-SigLIP2-256__webli ViT-L-16-SigLIP2-384__webli ViT-L-16-SigLIP2-512__webli "
        "ViT-g-14__laion2b-s12b-b42k XLM-Roberta-Large-ViT-H-14__frozen_laion5b_s13b_b90k"
    ),
    1152: (
        "ViT-SO400M-14-SigLIP-384__webli ViT-SO400M-14-SigLIP2-378__webli ViT-SO400M-14-SigLIP2__webli "
        "ViT-SO400M-16-SigLIP2-256__webli ViT-SO400M-16-SigLIP2-384__webli ViT-SO400M-16-SigLIP2-512__webli "
        "nllb-clip-large-siglip__mrl nllb-clip-large-siglip__v1"
    ),
    1536: "ViT-gopt-16-SigLIP2-256__webli ViT-gopt-16-SigLIP2-384__webli",
}
_DIMENSIONS = {name: size for size, names in _KNOWN.items() for name in names.split()}


def _write(job: Job) -> None:
    name = _name(job)
    needs.dimensions(job, _DIMENSIONS[name])
    needs.square(job)
    needs.no_padding_of_images(job)
    needs.tokenizer_file(job)
    job.encoder("image", f"{name}/visual/model.onnx", RenameInput("image"))
    job.encoder("text", f"{name}/textual/model.onnx", NarrowIds(), RenameInput("text"))
    job.json(f"{name}/config.json", _config(job))
    job.json(f"{name}/visual/preprocess_cfg.json", {"mode": "RGB", **configs.open_clip_pixels(job)})
    configs.write_texts(job, f"{name}/textual")
    job.remarks.append("it may save the optimised graph beside the file: the folder must be writable.")
    if job.preprocess.resize_mode != "shortest":
        job.remarks.append(
            f"releases that do not read resize_mode crop images, and this model wants {job.preprocess.resize_mode}."
        )


def _name(job: Job) -> str:
    """The model's name as its list has it.

    Raises:
        BundleError: it is not there.
    """
    model = job.bundle.manifest.model
    plain = model.name.removesuffix("-quickgelu")
    given = [job.name] if job.name else [f"{model.name}__{model.pretrained}", f"{plain}__{model.pretrained}"]
    alike = {name.replace("_", "-"): name for name in _DIMENSIONS}
    found = next((alike[name.replace("_", "-")] for name in given if name.replace("_", "-") in alike), None)
    if found is None:
        raise job.refusal(
            f"loads the models of its list only, and {short(given[0])} is not on it. --name ViT-B-32__openai would "
            "have it served under that name, with embeddings of 512 numbers"
        )
    return found


def _config(job: Job) -> dict[str, object]:
    """What open_clip says of an architecture, as far as it is read."""
    text: dict[str, object] = {"context_length": job.tokenizer.context_length}
    if job.tokenizer.clean is not None:
        text["tokenizer_kwargs"] = {"clean": job.tokenizer.clean}
    return {"embed_dim": job.dimensions, "vision_cfg": {"image_size": job.preprocess.size[0]}, "text_cfg": text}


IMMICH = Stack(
    "immich",
    _write,
    "copy the model's folder to clip/ in the service's cache, and choose its name in the settings",
)
