"""Writing the FP32 bundle of a loaded model."""

import json
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, Bundle
from d4c_onnx.errors import CheckFailed, GraphError
from d4c_onnx.export.parity import check_images, check_texts
from d4c_onnx.export.tokenizer_file import write_checked_tokenizer
from d4c_onnx.export.trace import trace_tower
from d4c_onnx.files import staged_folder
from d4c_onnx.graph.model import save_model, set_metadata, signature_of
from d4c_onnx.manifest import Manifest, ModelInfo, Signature, TokenizerInfo
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.golden import FP32_BOUNDS, golden_texts, write_golden


def export_fp32(
    loaded: LoadedModel,
    output_path: Path,
    *,
    seed: int,
    raw: bool = False,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Export both towers, check them against torch, and write a complete bundle; or leave nothing behind.

    Args:
        loaded: the model.
        output_path: the bundle's folder.
        seed: of the random parity input; also, for random weights, what makes the model again.
        raw: leave the embeddings unnormalised.
        overwrite: replace what d4c-onnx wrote there.
        on_step: told after each of four steps.

    Raises:
        CheckFailed: a written file differs from torch by more than 1e-4.
        GraphError: torch cannot trace a tower.
        BundleError: the folder is in the way, or cannot be written.
    """
    on_step("export", 0, 4, {})
    with staged_folder(output_path, overwrite) as stage:
        text = _export_text(loaded, stage, seed, raw)
        on_step("export", 1, 4, {})
        image, image_difference = _export_image(loaded, stage, seed, raw, text.tokenizer)
        on_step("export", 2, 4, {})
        files = (stage / IMAGE_ENCODER, stage / TEXT_ENCODER)
        write_golden(stage, files, loaded.preprocess, _golden(loaded, text.tokenizer), FP32_BOUNDS, text.tokenizer)
        on_step("export", 3, 4, {})
        worst = {"image": image_difference, "text": text.difference}
        manifest = Manifest(
            model=_describe(loaded, raw, text.tokenizer),
            preprocess=loaded.preprocess,
            tokenizer=text.tokenizer,
            io={IMAGE_ENCODER: image, TEXT_ENCODER: text.signature},
            seed=seed,
            parity_max_abs_difference={tower: float(f"{value:.3g}") for tower, value in worst.items()},
        )
        written = write_manifest(stage, manifest)
    on_step("export", 4, 4, {})
    return Bundle(output_path, written)


@dataclass(frozen=True, slots=True)
class _Text:
    """A text encoder that is written: what its texts are, and how far it is from torch."""

    tokenizer: TokenizerInfo
    signature: Signature
    difference: float


def _export_text(loaded: LoadedModel, stage: Path, seed: int, raw: bool) -> _Text:
    """Write and check text encoder and tokenizer, at a fixed length where padding turns out not to be hidden."""
    if loaded.causal or not loaded.dynamic_sequence:
        return _try_text(loaded, stage, seed, raw, loaded.dynamic_sequence)
    try:
        return _try_text(loaded, stage, seed, raw, dynamic=True)
    except (GraphError, CheckFailed) as error:  # another release of transformers, or an encoder of another form
        return _try_text(loaded, stage, seed, raw, dynamic=False, why_fixed=str(error))


def _try_text(
    loaded: LoadedModel, stage: Path, seed: int, raw: bool, dynamic: bool, why_fixed: str | None = None
) -> _Text:
    context = loaded.context_length
    example = torch.from_numpy(loaded.tokenize(["a photo of a cat.", "two words"]))
    tokenizer = replace(
        write_checked_tokenizer(loaded, stage / TOKENIZER, fixed=not dynamic),
        causal=loaded.causal,
        dynamic_sequence=dynamic,
        why_fixed=why_fixed,
    )
    _, tower = loaded.deployed_towers(normalize=not raw, fixed=not dynamic)
    # an odd, short example length: nothing may be specialised to the context length
    short = example[:, : min(11, context)] if dynamic else example
    graph = trace_tower(tower, short, "input_ids", "text_embeds", context if dynamic else None)
    signature = _write(graph, _notes(loaded, raw, tokenizer), stage / TEXT_ENCODER)
    del graph, tower  # the weights of a graph are a copy of the tower's
    difference = check_texts(loaded, stage / TEXT_ENCODER, seed)
    return _Text(tokenizer, signature, difference)


def _golden(loaded: LoadedModel, tokenizer: TokenizerInfo) -> list[tuple[str, tuple[int, ...]]]:
    """The golden texts with the ids of the model's own tokenizer."""
    texts = golden_texts(loaded.context_length)
    rows = loaded.tokenize(list(texts))
    cut = loaded.cut(rows) if tokenizer.dynamic_sequence else map(tuple, rows.tolist())
    return list(zip(texts, cut, strict=True))


def _export_image(
    loaded: LoadedModel, stage: Path, seed: int, raw: bool, tokenizer: TokenizerInfo
) -> tuple[Signature, float]:
    """Write and check the image encoder: its signature, and how far it is from torch."""
    tower, _ = loaded.deployed_towers(normalize=not raw)
    graph = trace_tower(tower, torch.randn(2, 3, *loaded.preprocess.size), "pixel_values", "image_embeds")
    signature = _write(graph, _notes(loaded, raw, tokenizer), stage / IMAGE_ENCODER)
    del graph, tower
    return signature, check_images(loaded, stage / IMAGE_ENCODER, seed)


def _notes(loaded: LoadedModel, raw: bool, tokenizer: TokenizerInfo) -> dict[str, str]:
    """What a file says of itself."""
    told = asdict(_describe(loaded, raw, tokenizer))
    # who said so is the manifest's to tell, not every file's
    notes = {key: str(value) for key, value in told.items() if key not in ("sources", "resampled")}
    return notes | {
        "preprocess": json.dumps(asdict(loaded.preprocess)),
        "tokenizer": json.dumps(tokenizer.as_dict()),
    }


def _write(graph: ir.Model, notes: dict[str, str], path: Path) -> Signature:
    """Write an encoder; its signature."""
    set_metadata(graph, notes)
    save_model(graph, path)
    return signature_of(graph)


def _describe(loaded: LoadedModel, raw: bool, tokenizer: TokenizerInfo) -> ModelInfo:
    model = loaded.model
    scale, bias = getattr(model, "logit_scale", None), getattr(model, "logit_bias", None)
    return ModelInfo(
        name=loaded.name,
        pretrained=loaded.pretrained,
        weights_sha256=loaded.weights_sha256,
        quick_gelu=loaded.quick_gelu,
        logit_scale=None if scale is None else float(np.exp(scale.detach().numpy()).item()),
        logit_bias=None if bias is None else float(bias.detach().numpy().item()),
        normalized=not raw,
        context_length=loaded.context_length,
        end_id=tokenizer.eot_id,
        dataset=loaded.embedded.dataset if loaded.embedded and loaded.pretrained == "embedded" else None,
        sources=loaded.sources,
        resampled=loaded.resampled,
    )
