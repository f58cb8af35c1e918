"""Config files beside a model, as Hugging Face's libraries and those that follow them read them."""

from __future__ import annotations

from tokenizers import Tokenizer

from d4c_onnx.errors import BundleError
from d4c_onnx.packaging.job import Job
from d4c_onnx.runtime.panics import tokenizer_of
from d4c_onnx.runtime.preprocess import FILTERS, filter_of

WEB_CONFIG = "web.json"


def preprocessor_config(job: Job) -> dict[str, object]:
    """`preprocessor_config.json` of CLIP's image processor."""
    config = job.preprocess
    height, width = config.size
    whole = {"height": height, "width": width}
    squash = config.resize_mode == "squash"
    return {
        "image_processor_type": "CLIPImageProcessor",
        "feature_extractor_type": "CLIPFeatureExtractor",
        "do_convert_rgb": True,
        "do_resize": True,
        "size": whole if squash else {"shortest_edge": min(height, width)},
        "resample": int(FILTERS[filter_of(config)]),
        "do_center_crop": not squash,
        "crop_size": whole,
        "do_rescale": True,
        "rescale_factor": 1 / 255,
        "do_normalize": True,
        "image_mean": list(config.mean),
        "image_std": list(config.std),
    }


def open_clip_pixels(job: Job) -> dict[str, object]:
    """open_clip's own keys, with the filter that is used."""
    config = job.preprocess
    return {
        "size": list(config.size),
        "mean": list(config.mean),
        "std": list(config.std),
        "resize_mode": config.resize_mode,
        "interpolation": filter_of(config),
        "fill_color": config.fill_color,
    }


def tokenizer_config(job: Job) -> dict[str, object]:
    """`tokenizer_config.json`: where texts are cut, and what fills rows up; all else is in tokenizer.json."""
    info, name = job.tokenizer, _tokenizer(job).id_to_token
    found = {
        "bos_token": None if info.sot_id is None else name(info.sot_id),
        "eos_token": None if info.eot_id is None else name(info.eot_id),
        "unk_token": None if info.eot_id is None else name(info.eot_id),
        "pad_token": name(job.pad_id()),
    }
    return {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "model_max_length": info.context_length,
        "model_input_names": ["input_ids", "attention_mask"],
        "clean_up_tokenization_spaces": False,
        **{key: value for key, value in found.items() if value is not None},
    }


def clip_config(job: Job) -> dict[str, object]:
    """`config.json` that says `clip`, whatever the towers are: what runs is the graph."""
    info = job.tokenizer
    ids = {"bos_token_id": info.sot_id, "eos_token_id": info.eot_id, "pad_token_id": info.pad_id}
    return {
        "architectures": ["CLIPModel"],
        "model_type": "clip",
        "projection_dim": job.dimensions,
        "logit_scale_init_value": 2.6592,
        "text_config": {
            "model_type": "clip_text_model",
            "max_position_embeddings": info.context_length,
            "vocab_size": _tokenizer(job).get_vocab_size(),
            "projection_dim": job.dimensions,
            **{key: value for key, value in ids.items() if value is not None},
        },
        "vision_config": {
            "model_type": "clip_vision_model",
            "image_size": min(job.preprocess.size),
            "projection_dim": job.dimensions,
        },
    }


def _tokenizer(job: Job) -> Tokenizer:
    """Raises BundleError: tokenizer.json is damaged."""
    path = job.bundle.tokenizer
    return tokenizer_of(path, lambda why: BundleError(f"{path}: is no tokenizer ({why}). Export the bundle again."))


def write_texts(job: Job, folder: str = "") -> None:
    """`tokenizer.json` and `tokenizer_config.json` into a folder of the package."""
    place = f"{folder}/" if folder else ""
    job.copy(job.bundle.tokenizer, f"{place}tokenizer.json")
    job.json(f"{place}tokenizer_config.json", tokenizer_config(job))


def remark_on_pixels(job: Job, who: str) -> None:
    """What a stack's own resize does to an image that pillow's would not."""
    wanted = filter_of(job.preprocess)
    if wanted not in ("bicubic", "bilinear"):
        job.remarks.append(f"{who} may not know the filter {wanted}, which the model wants.")


def remark_on_cleaning(job: Job, who: str) -> None:
    """Texts reach the tokenizer as they are: what its file cannot do of open_clip's cleaning is not done."""
    if job.tokenizer.clean is not None:
        job.remarks.append(
            f"{who} does not clean texts as open_clip does: tokenizer.json does most of it, not repairs of mojibake "
            "and HTML entities; rare texts get other ids."
        )
