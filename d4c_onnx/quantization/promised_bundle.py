"""Both encoders of an FP32 bundle as the smallest files that keep a promise, in a bundle of the same form."""

import shutil
from pathlib import Path

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.files import staged_folder
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.calibration_batches import calibration_readers
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.ladder import EncoderLadder
from d4c_onnx.quantization.promise_search import Judges, PromiseSearch
from d4c_onnx.quantization.quantized_completion import finish_quantized
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.recipe import Recipe


def quantize_to_promise(
    bundle: Bundle,
    dataset: CalibrationSet,
    output_path: Path,
    recipe: Recipe,
    judges: Judges,
    *,
    provider: str = "cpu",
    threads: int = 0,
    overwrite: bool = False,
    on_step: OnStep = silent,
) -> Bundle:
    """Search the ladder of widths for the config's promise, and write the bundle; or leave nothing behind.

    Args:
        bundle, dataset, output_path, overwrite: see `quantize_bundle_files`.
        recipe: with `target_cosine`, `max_drop` or both.

    Raises:
        CheckFailed: no configuration keeps the promise; its `report` is the `Promise` with all that was tried, and
            what was in `output_path` is still there.
        GraphError, BundleError, RecipeError: see `quantize_bundle_files`.
    """
    readers, config = calibration_readers(bundle, dataset), recipe.quantization
    served = target_of(config)
    with staged_folder(output_path, overwrite) as stage:
        ladders = {}
        for name, reader in readers.items():
            task = EncoderTask(config, served, reader, provider=provider, threads=threads, on_step=on_step)
            ladders[name] = EncoderLadder(bundle.path / name, stage / "ladder" / name, task)
        found = PromiseSearch(bundle, stage / "ladder", ladders, config, judges)
        promise, chosen = found.run()
        for written in chosen.values():
            for file in written.path.parent.iterdir():  # weights may lie beside the graph
                file.rename(stage / file.name)
        shutil.rmtree(stage / "ladder")
        made = {name: written.report for name, written in chosen.items()}
        written_bundle = finish_quantized(
            bundle, dataset, stage, recipe, readers, made, promise, threads=threads, on_step=on_step
        )
    return Bundle(output_path, written_bundle)
