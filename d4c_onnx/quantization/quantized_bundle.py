"""Both encoders of an FP32 bundle, quantised into a bundle of the same form."""

from pathlib import Path

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.files import staged_folder
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.bit_budget import spend_budget
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.encoder import quantize_encoder
from d4c_onnx.quantization.quantized_completion import finish_quantized
from d4c_onnx.recipe import Recipe


def quantize_bundle_files(
    bundle: Bundle,
    dataset: CalibrationSet,
    output_path: Path,
    recipe: Recipe,
    *,
    provider: str = "cpu",
    threads: int = 0,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Quantise both encoders and write the quantised bundle; or leave nothing behind.

    Args:
        bundle: in FP32.
        dataset: calibration images and prompts of the bundle's model.
        output_path: the quantised bundle's folder.
        recipe: widths, rounding, ranges; the manifest holds all of it, and of images and texts what the set says.
        overwrite: replace what d4c-onnx wrote there.

    Raises:
        GraphError: an encoder cannot be quantised.
        BundleError: the folder cannot be written.
        CheckFailed: onnxruntime's optimiser changes the answers beyond the rounding of quantised activations.
        RecipeError: keys contradict the target; the bit budget is smaller than what the first and last layers take.
    """
    readers, config = calibration_readers(bundle, dataset), recipe.quantization
    widths = spend_budget(bundle, readers, config, provider=provider, threads=threads, on_step=on_step)
    with staged_folder(output_path, overwrite) as stage:
        reports = {
            name: quantize_encoder(
                bundle.path / name,
                stage / name,
                reader,
                config,
                widths=widths.get(name),
                provider=provider,
                threads=threads,
                on_step=on_step,
            )
            for name, reader in readers.items()
        }
        written = finish_quantized(
            bundle, dataset, stage, recipe, readers, reports, None, threads=threads, on_step=on_step
        )
    return Bundle(output_path, written)
