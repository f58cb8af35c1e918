"""What makes a bundle of two written encoders: tokenizer, golden vectors, a manifest that says how they were made."""

import shutil
from collections.abc import Mapping
from pathlib import Path

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, Bundle
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.graph.model import load_model, signature_of
from d4c_onnx.graph.stored import average_bits
from d4c_onnx.manifest import Manifest, Quantization, Session
from d4c_onnx.manifest_file import GOLDEN_FOLDER, versions, write_manifest
from d4c_onnx.quantization.encoder_report import MINIMUM_ORT, EncoderReport
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import Recipe
from d4c_onnx.runtime.golden import Bounds, read_golden, write_golden
from d4c_onnx.runtime.optimizer import OptimizerEffect

# What golden vectors may show on other machines: other int8 kernels round one value to its neighbour, and what follows
# from that is a length of 0.02 on a mini; other float16 ones.
GOLDEN_BOUNDS, FP16_GOLDEN_BOUNDS = Bounds(least=0.02, most=0.05), Bounds(least=0.002, most=0.01)
FP16_MINIMUM_ORT = MINIMUM_ORT


def describe_quantization(
    recipe: Recipe,
    dataset: CalibrationSet,
    reports: Mapping[str, EncoderReport],
    effects: Mapping[str, OptimizerEffect],
    session: Session,
    source_files: Mapping[str, str],
) -> Quantization:
    """For the manifest.

    Args:
        reports, effects: by encoder file: how it was quantised, and what onnxruntime's optimiser does to it.
        session: what the files are served with.
        source_files: SHA-256 of the FP32 encoders.
    """
    config, key = recipe.quantization, dataset.manifest.key
    layers = [layer for report in reports.values() for layer in report.layers]
    return Quantization(
        bits=config.bits.lower(),
        target=config.target,
        target_note=target_of(config).note,
        # which images and texts calibrated is the set's word: it may have been given, and it holds no machine's paths
        recipe=recipe.model_dump(mode="json") | {"synthesis": dict(key.synthesis), "text": dict(key.text)},
        minimum_onnxruntime=max(report.minimum_onnxruntime for report in reports.values()),
        accuracy_mode_only=config.activation_bits < 8 or config.weight_bits == 6,
        source_files=source_files,
        session=session,
        optimizer_effect={name: effect.record() for name, effect in effects.items()},
        weight_bits_average=round(average_bits(layers), 4),
        encoders={name: report.record() for name, report in reports.items()},
        calibration=key.id,
        calibration_seed=key.seed,
    )


def finish_bundle(bundle: Bundle, stage: Path, made: Quantization, *, seed: int, bounds: Bounds) -> Manifest:
    """Put beside two written encoders what every bundle made from an FP32 one has: tokenizer, golden vectors, manifest.

    Args:
        bundle: in FP32.
        stage: the folder that holds the encoders.
        made: how they were made.
        seed: of the recipe.
        bounds: of the golden vectors' tolerance.
    """
    if bundle.tokenizer.exists():
        shutil.copyfile(bundle.tokenizer, stage / TOKENIZER)
    source = bundle.manifest
    files = (stage / IMAGE_ENCODER, stage / TEXT_ENCODER)
    write_golden(
        stage,
        files,
        source.preprocess,
        [(one.text, one.input_ids) for one in read_golden(bundle.path).texts],
        bounds,
        source.tokenizer,
        entries=made.session.config_entries,
        images_from=bundle.path / GOLDEN_FOLDER,
    )
    manifest = Manifest(
        model=source.model,
        preprocess=source.preprocess,
        tokenizer=source.tokenizer,
        io={file.name: signature_of(load_model(file)) for file in files},
        seed=seed,
        quantization=made,
    )
    return write_manifest(stage, manifest)


def source_files(bundle: Bundle) -> dict[str, str]:
    """SHA-256 of the encoders of an FP32 bundle: which one another bundle was made from."""
    return {name: bundle.manifest.files[name].sha256 for name in (IMAGE_ENCODER, TEXT_ENCODER)}


def made_by_same_tools(bundle: Bundle) -> bool:
    """Whether today's packages would write these files."""
    own, known = versions(), bundle.manifest.versions
    return all(known.get(name) == own.get(name) for name in ("d4c-onnx", "onnx", "onnxruntime"))
