"""Writing the FP32 bundle of a loaded model."""

import json
from dataclasses import asdict, replace
from pathlib import Path

import numpy as np
import onnx_ir as ir
import torch

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, Bundle
from d4c_onnx.export.parity import TOLERANCE, check_parity
from d4c_onnx.export.trace import trace_tower
from d4c_onnx.files import staged_folder
from d4c_onnx.graph.model import save_model, set_metadata, signature_of
from d4c_onnx.manifest import Manifest, ModelInfo, Signature, TokenizerInfo
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.models.tokenizer_export import write_tokenizer
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.golden import TEXT, golden_input, write_golden


def export_fp32(loaded: LoadedModel, target: Path, *, seed: int, raw: bool = False, on_step: OnStep = silent) -> Bundle:
    """Export both towers, check them against torch, and write a complete bundle; or leave nothing behind.

    Args:
        loaded: the model.
        target: the bundle's folder.
        seed: of the random parity input; also, for random weights, what makes the model again.
        raw: leave the embeddings unnormalised.
        on_step: told after each of four steps.

    Raises:
        CheckFailed: a written file differs from torch by more than 1e-4.
        GraphError: torch cannot trace a tower.
        BundleError: the folder cannot be written.
    """
    on_step("export", 0, 4, {})
    height, width = loaded.preprocess.size
    example_ids = torch.from_numpy(loaded.tokenize(["a photo of a cat.", "two words"]))
    dynamic = loaded.dynamic_sequence
    context = loaded.context_length
    # an odd, short example length: nothing may be specialised to the context length
    short = example_ids[:, : min(11, context)] if dynamic else example_ids
    with staged_folder(target) as stage:
        tokenizer = write_tokenizer(loaded.tokenizer, context, stage / TOKENIZER, fixed=not dynamic)
        tokenizer = replace(tokenizer, causal=dynamic, dynamic_sequence=dynamic)
        model = _describe(loaded, raw, tokenizer)
        notes = {key: str(value) for key, value in asdict(model).items()}
        notes |= {"preprocess": json.dumps(asdict(loaded.preprocess)), "tokenizer": json.dumps(tokenizer.as_dict())}
        image, text = loaded.deployed_towers(normalize=not raw)
        # one after the other: the weights of a graph are a copy of the tower's
        pixels = torch.randn(2, 3, height, width)
        graph = trace_tower(image, pixels, "pixel_values", "image_embeds")
        io = {IMAGE_ENCODER: _write(graph, notes, stage / IMAGE_ENCODER)}
        del graph, image
        on_step("export", 1, 4, {})
        graph = trace_tower(text, short, "input_ids", "text_embeds", context if dynamic else None)
        io[TEXT_ENCODER] = _write(graph, notes, stage / TEXT_ENCODER)
        del graph, text
        on_step("export", 2, 4, {})
        ids = loaded.tokenize([TEXT])
        golden = {"pixel_values": golden_input(loaded.preprocess), "input_ids": ids}
        worst = check_parity(loaded, stage / IMAGE_ENCODER, stage / TEXT_ENCODER, golden, seed)
        on_step("export", 3, 4, {})
        fed = ids[:, : int((ids != 0).sum())] if dynamic else ids
        write_golden(stage, stage / IMAGE_ENCODER, stage / TEXT_ENCODER, loaded.preprocess, fed, TOLERANCE)
        manifest = Manifest(
            model=model,
            preprocess=loaded.preprocess,
            tokenizer=tokenizer,
            io=io,
            seed=seed,
            parity_max_abs_difference={tower: float(f"{value:.3g}") for tower, value in worst.items()},
        )
        written = write_manifest(stage, manifest)
    on_step("export", 4, 4, {})
    return Bundle(target, written)


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
    )
