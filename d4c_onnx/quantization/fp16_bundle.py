"""The FP16 bundle: what a GPU multiplies fastest where no int8 kernel takes QDQ files."""

from pathlib import Path

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle, is_bundle, open_bundle
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.errors import BundleError, GraphError
from d4c_onnx.files import staged_folder
from d4c_onnx.graph.model import clear_notes, load_model, save_model
from d4c_onnx.manifest import Quantization, Session
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.bundle_completion import (
    FP16_GOLDEN_BOUNDS,
    FP16_MINIMUM_ORT,
    finish_bundle,
    made_by_same_tools,
    source_files,
)
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.optimizer_check import check_optimizer
from d4c_onnx.quantization.rewrites import in_float16
from d4c_onnx.recipe import QuantizationConfig

_NOTE = (
    "float16 weights and products, for the CUDA provider; on CPUs onnxruntime computes them in float32, "
    "so there it saves download and disk, not time"
)


def write_fp16_bundle(
    bundle: Bundle,
    output_path: Path,
    config: QuantizationConfig,
    dataset: CalibrationSet,
    *,
    threads: int = 0,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Write both encoders of an FP32 bundle in FP16 (inputs and outputs stay as they are); or leave nothing behind.

    onnxruntime's own converter does it; weights and products are float16, embeddings float32.

    Args:
        config: of it, what `_shaped_by` names; widths and rounding are not FP16's.
        dataset: what onnxruntime's optimiser is checked on.
        threads, on_step: of that check.
        overwrite: replace what d4c-onnx wrote there.

    Raises:
        CheckFailed: onnxruntime's optimiser changes the answers.
        RecipeError: keys contradict the target.
        GraphError: the converter refused an encoder.
        BundleError: the folder cannot be written.
    """
    readers = calibration_readers(bundle, dataset)
    with staged_folder(output_path, overwrite) as stage:
        for name in (IMAGE_ENCODER, TEXT_ENCODER):
            model = load_model(bundle.path / name)
            clear_notes(model)
            try:
                converted, _ = in_float16(model)
            except GraphError as error:
                raise GraphError(f"{bundle.path / name}: {error}") from error
            save_model(converted, stage / name, limit_bytes=0 if config.external_data else None)
        session = Session()
        effects = check_optimizer(bundle, stage, readers, session, threads=threads, on_step=on_step)
        made = Quantization(
            bits="fp16",
            target="cuda",
            target_note=_NOTE,
            recipe=_shaped_by(config),
            minimum_onnxruntime=FP16_MINIMUM_ORT,
            accuracy_mode_only=False,
            source_files=source_files(bundle),
            session=session,
            optimizer_effect={name: effect.record() for name, effect in effects.items()},
        )
        written = finish_bundle(bundle, stage, made, seed=bundle.manifest.seed, bounds=FP16_GOLDEN_BOUNDS)
    return Bundle(output_path, written)


def find_fp16_bundle(bundle: Bundle, output_path: Path, config: QuantizationConfig) -> Bundle | None:
    """What `write_fp16_bundle` would write, where an earlier run wrote it: widths of one model share one FP16 bundle.

    None where nothing is there, or something else, or a damaged one.
    """
    if not is_bundle(output_path):
        return None
    try:
        made = open_bundle(output_path)
    except BundleError:
        return None
    # weights may lie beside a graph, whose SHA-256 then says nothing of them
    same_weights = made.weights_sha256 == bundle.weights_sha256
    found, expected = made.manifest.quantization, ("fp16", _shaped_by(config), source_files(bundle))
    same_form = found is not None and (found.bits, found.recipe, found.source_files) == expected
    return made if same_form and same_weights and made_by_same_tools(made) else None


def _shaped_by(config: QuantizationConfig) -> dict[str, object]:
    """What of a recipe an FP16 bundle depends on."""
    return {"quantization": {"external_data": config.external_data}}
