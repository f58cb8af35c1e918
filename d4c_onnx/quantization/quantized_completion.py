"""What is left to do when both quantised encoders are written: the check of onnxruntime's optimiser, and the bundle."""

from collections.abc import Mapping
from dataclasses import replace
from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.manifest import EXACT_PRODUCTS, Manifest, Session
from d4c_onnx.progress import OnStep
from d4c_onnx.quantization.bundle_completion import (
    FP16_GOLDEN_BOUNDS,
    GOLDEN_BOUNDS,
    describe_quantization,
    finish_bundle,
    source_files,
)
from d4c_onnx.quantization.encoder_report import EncoderReport
from d4c_onnx.quantization.optimizer_check import check_optimizer
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import QuantizationConfig, Recipe
from d4c_onnx.results import Promise


def session_of(config: QuantizationConfig) -> Session:
    """What files of a config are served with."""
    # full-range weights saturate on x86 without VNNI: their sessions need a setting, and the manifest says so
    exact = target_of(config).reduce_range or config.weights_only
    return Session(config_entries={} if exact else EXACT_PRODUCTS)


def finish_quantized(
    bundle: Bundle,
    dataset: CalibrationSet,
    stage: Path,
    recipe: Recipe,
    readers: Mapping[str, CalibrationDataReader],
    reports: Mapping[str, EncoderReport],
    promise: Promise | None,
    *,
    threads: int,
    on_step: OnStep,
) -> Manifest:
    """Check two written encoders, and put beside them what a bundle has.

    Args:
        stage: the folder that holds the encoders.
        reports: by encoder file.
        promise: what their widths were searched for; None where they were given.

    Raises:
        CheckFailed: onnxruntime's optimiser changes the answers.
    """
    config = recipe.quantization
    session = session_of(config)
    effects = check_optimizer(bundle, stage, readers, session, threads=threads, on_step=on_step)
    made = describe_quantization(recipe, dataset, reports, effects, session, source_files(bundle))
    bounds = FP16_GOLDEN_BOUNDS if config.weights_only else GOLDEN_BOUNDS
    made = replace(made, promise=promise)
    return finish_bundle(bundle, stage, made, seed=recipe.seed, bounds=bounds)
