"""What was made, measured: accuracy beside FP32, into the manifests, and held against the recipe's limits."""

from dataclasses import replace
from pathlib import Path

from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.measure.accuracy import check_limits, evaluate
from d4c_onnx.pipeline.quantize_report import QuantizeReport, report_of
from d4c_onnx.pipeline.quantize_run import Clock, MadeBundles
from d4c_onnx.pipeline.quantize_task import QuantizeTask
from d4c_onnx.results import Accuracy


def measure_made(task: QuantizeTask, made: MadeBundles, clock: Clock) -> QuantizeReport:
    """Accuracy of what was made beside FP32, written into the manifests and held against the recipe's limits."""
    beside = [made.fp16] if made.fp16 else []
    accuracy = evaluate([made.fp32, made.quantized, *beside], task.recipe, made.dataset, task.machine, task.on_step)
    clock.lap("evaluate")
    kept = _without_paths(accuracy, task.folder)
    # the quantised one last: until its manifest has its accuracy, a rerun measures both
    for bundle in (*beside, made.quantized):
        write_manifest(bundle.path, bundle.manifest.measured(kept))
    report = report_of(made.fp32, made.quantized, made.dataset, accuracy, clock.seconds)
    check_limits(accuracy, task.recipe, report)
    return report


def _without_paths(accuracy: Accuracy, folder: Path) -> Accuracy:
    """Bundles as seen from the FP32 one, and a data set's file by its name: a manifest holds no machine's paths."""
    rows = (
        replace(row, bundle="fp32" if Path(row.bundle) == folder else Path(row.bundle).name) for row in accuracy.bundles
    )
    name = Path(accuracy.dataset).name if accuracy.dataset else None
    return replace(accuracy, bundles=tuple(rows), dataset=name)
