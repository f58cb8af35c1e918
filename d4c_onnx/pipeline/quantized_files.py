"""The quantised files of a task, and what a promise about them is held against."""

from __future__ import annotations

from collections.abc import Callable
from typing import TYPE_CHECKING, Any

from d4c_onnx.bundle import Bundle
from d4c_onnx.files import refuse_existing
from d4c_onnx.measure.accuracy import evaluate, fidelity_recipe
from d4c_onnx.pipeline.quantize_task import QuantizeTask
from d4c_onnx.recipe import Recipe
from d4c_onnx.results import Versus

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.quantization import Judges


def quantized_files(task: QuantizeTask, fp32: Bundle, dataset: CalibrationSet) -> Bundle:
    """What an interrupted run wrote, files of the recipe's widths, or the smallest ones that keep its promise.

    Raises:
        GraphError, BundleError, RecipeError: the files cannot be made.
        CheckFailed: no widths keep the promise, or onnxruntime's optimiser changes the answers.
    """
    from d4c_onnx.quantization import quantize_bundle_files, quantize_to_promise
    from d4c_onnx.runtime.session import resolve_provider

    key, resumed = dataset.manifest.key, task.resumed
    made = None if resumed is None else resumed.manifest.quantization
    if resumed is not None and made is not None:
        if made.calibration != key.id:  # of other images: not this run's to finish
            refuse_existing(task.output_path, overwrite=False)
        return resumed
    output_path, provider, threads = task.output_path, resolve_provider(task.machine.provider), task.machine.threads
    if not task.recipe.quantization.promised:
        return quantize_bundle_files(
            fp32,
            dataset,
            output_path,
            task.recipe,
            provider=provider,
            threads=threads,
            overwrite=task.overwrite,
            on_step=task.on_step,
        )
    return quantize_to_promise(
        fp32,
        dataset,
        output_path,
        task.recipe,
        _judges(task, fp32, dataset),
        provider=provider,
        threads=threads,
        overwrite=task.overwrite,
        on_step=task.on_step,
    )


def _judges(task: QuantizeTask, fp32: Bundle, dataset: CalibrationSet) -> Judges:
    """On the set's held-out part, and on the recipe's labelled set."""
    from d4c_onnx.evaluation.baseline import Baselines
    from d4c_onnx.quantization import Judges

    def judge(recipe: Recipe) -> Callable[[Bundle], Versus]:
        known: Baselines[Any] = Baselines()  # FP32 is asked once

        def beside(trial: Bundle) -> Versus:
            measured = evaluate([fp32, trial], recipe, dataset, task.machine, task.on_step, known)
            found = measured.bundles[1].versus_first
            assert found is not None
            return found

        return beside

    return Judges(judge(fidelity_recipe(task.recipe)), judge(task.recipe))
