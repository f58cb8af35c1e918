"""A model becomes a quantised bundle: decide what there is to do, do it, measure what was made."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path

from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.measure.accuracy import check_limits, evaluate
from d4c_onnx.measure.machine import Machine
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.quantize_report import QuantizeReport, report_of
from d4c_onnx.pipeline.quantize_run import Clock, MadeBundles, run
from d4c_onnx.pipeline.quantize_task import QuantizeTask, decide
from d4c_onnx.pipeline.source import claimed_source
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import Recipe
from d4c_onnx.results import Accuracy


def quantize_bundle(
    source: str,
    recipe: Recipe,
    *,
    output: str | Path,
    pretrained: str | None = None,
    options: ModelOptions | None = None,
    prompts: str | Path | None = None,
    calibration: str | Path | None = None,
    overwrite: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
) -> QuantizeReport:
    """Quantise both encoders of a model or bundle, and measure the written files against FP32.

    Exports first when the model has no bundle yet, synthesises when there is no calibration set of the recipe's key.
    The result goes to `<bundle>/<bits>/`; with `target: cuda` an FP16 bundle goes to `<bundle>/fp16/`, too, unless the
    same one is there from another width.

    Args:
        source: a model's name, or an FP32 bundle's path.
        options: what the user says of weights that do not say it themselves.
        calibration: a set's folder; none is then synthesised and torch is not needed for a bundle.

    Raises:
        BundleError: the folder of the result, or of the FP16 bundle, holds something else, or another run is writing.
        RecipeError: keys contradict the target.
        CheckFailed: top-1 or cosine fell by more than is allowed; the files are written, its `report` has the rest.
    """
    with claimed_source(source, output):
        task = decide(
            source,
            recipe,
            output=output,
            pretrained=pretrained,
            options=options,
            prompts=prompts,
            calibration=calibration,
            overwrite=overwrite,
            machine=machine or Machine(),
            on_step=on_step,
        )
        clock = Clock()
        return _measure(task, run(task, clock), clock)


def _measure(task: QuantizeTask, made: MadeBundles, clock: Clock) -> QuantizeReport:
    """Accuracy of what was made beside FP32, written into the manifests and held against the recipe's limits."""
    beside = [made.fp16] if made.fp16 else []
    accuracy = evaluate([made.fp32, made.quantized, *beside], task.recipe, made.dataset, task.machine, task.on_step)
    clock.lap("evaluate")
    kept = _without_paths(accuracy, task.folder)
    # the quantised one last: until its manifest has its accuracy, a rerun measures both
    for bundle in (*beside, made.quantized):
        write_manifest(bundle.path, bundle.manifest.measured(kept))
    report = report_of(made.fp32, made.quantized, accuracy, clock.seconds)
    check_limits(accuracy, task.recipe, report)
    return report


def _without_paths(accuracy: Accuracy, folder: Path) -> Accuracy:
    """Bundles as seen from the FP32 one, and a data set's file by its name: a manifest holds no machine's paths."""
    rows = (
        replace(row, bundle="fp32" if Path(row.bundle) == folder else Path(row.bundle).name) for row in accuracy.bundles
    )
    name = Path(accuracy.dataset).name if accuracy.dataset else None
    return replace(accuracy, bundles=tuple(rows), dataset=name)
