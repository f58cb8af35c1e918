"""The FP32 bundle of two towers that somebody else exported."""

from __future__ import annotations

from pathlib import Path

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle
from d4c_onnx.files import staged_folder
from d4c_onnx.foreign.encoders import check_widths, write_image_encoder, write_text_encoder
from d4c_onnx.foreign.opening import ForeignFiles, open_towers
from d4c_onnx.manifest import IMPORTED, Manifest, ModelInfo
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.golden import FP32_BOUNDS, golden_texts, write_golden


def import_files(
    files: ForeignFiles,
    output_path: Path,
    options: ModelOptions,
    *,
    seed: int,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Write a complete FP32 bundle of two towers, checked against their files; or leave nothing behind.

    Args:
        files: the towers.
        output_path: the bundle's folder; its name is the model's.
        options: what the user says of preprocessing.
        seed: of the random input that both are compared on.
        overwrite: replace what d4c-onnx wrote there.

    Raises:
        GraphError, ModelError: a file is not what it must be, or nobody says what it cannot say itself.
        CheckFailed, BundleError: a tower answers otherwise than its file; it, or the folder, cannot be used.
    """
    on_step("import", 0, 4, {})
    opened = open_towers(files, options)
    on_step("import", 1, 4, {})
    notes = {"name": output_path.name, "weights_sha256": opened.sha256}
    with staged_folder(output_path, overwrite) as stage:
        text, texts, tokenizer = write_text_encoder(opened.text, files, stage, notes)
        on_step("import", 2, 4, {})
        image = write_image_encoder(opened.image, opened.preprocess, stage, notes, seed)
        check_widths(image, text)
        on_step("import", 3, 4, {})
        encoders = (stage / IMAGE_ENCODER, stage / TEXT_ENCODER)
        rows = [(words, tuple(texts.ids([words])[0].tolist())) for words in golden_texts(texts.context)]
        write_golden(stage, encoders, opened.preprocess, rows, FP32_BOUNDS, tokenizer)
        info = ModelInfo(
            name=output_path.name,
            pretrained=IMPORTED,
            weights_sha256=opened.sha256,
            quick_gelu=image.quick_gelu or text.quick_gelu,
            logit_scale=None,
            logit_bias=None,
            normalized=image.normalized and text.normalized,
            context_length=texts.context,
            end_id=None,
            dataset=None,
            sources=opened.sources,
        )
        parity = {"image": image.difference, "text": text.difference}
        manifest = Manifest(
            model=info,
            preprocess=opened.preprocess,
            tokenizer=tokenizer,
            io={IMAGE_ENCODER: image.signature, TEXT_ENCODER: text.signature},
            seed=seed,
            parity_max_abs_difference={tower: float(f"{value:.3g}") for tower, value in parity.items()},
        )
        written = write_manifest(stage, manifest)
    on_step("import", 4, 4, {})
    return Bundle(output_path, written)
