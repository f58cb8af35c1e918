"""The work of a quantisation: export and synthesis where they have not been done, then the quantised files."""

from __future__ import annotations

import gc
import time
from dataclasses import dataclass
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.door import check_source
from d4c_onnx.measure.accuracy import check_measurable, held_out_counts
from d4c_onnx.measure.calibration_fit import check_set_fits
from d4c_onnx.memory import release_freed
from d4c_onnx.pipeline.calibration_sets import find_or_synthesize
from d4c_onnx.pipeline.exporting import use_threads
from d4c_onnx.pipeline.quantize_task import QuantizeTask
from d4c_onnx.pipeline.quantized_files import quantized_files
from d4c_onnx.pipeline.source import open_or_export

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


class Clock:
    """Wall-clock seconds per step."""

    def __init__(self) -> None:
        self.seconds: dict[str, float] = {}
        self._last = time.perf_counter()

    def lap(self, name: str) -> None:
        """End a step."""
        now = time.perf_counter()
        self.seconds[name] = now - self._last
        self._last = now


@dataclass(frozen=True, slots=True)
class MadeBundles:
    """What a run wrote or found, and what it was calibrated with.

    Attributes:
        fp32, quantized: the bundles.
        fp16: None where the target wants none.
        dataset: the calibration set.
    """

    fp32: Bundle
    quantized: Bundle
    fp16: Bundle | None
    dataset: CalibrationSet


def run(task: QuantizeTask, clock: Clock) -> MadeBundles:
    """Do what there is to do; the encoders, which somebody else may have written, are looked at first.

    Raises:
        ModelError, CalibrationError, GraphError, BundleError, RecipeError: a step cannot be done.
        CheckFailed: onnxruntime's optimiser changes the answers.
    """
    fp32, dataset = _calibrated(task, clock)
    # the torch model is gone by now, if it was loaded: a large one leaves no room for what follows
    gc.collect()  # its modules refer to each other in circles
    release_freed()
    check_set_fits(dataset, fp32)
    clock.lap("synthesize")
    made = MadeBundles(fp32, quantized_files(task, fp32, dataset), _fp16(task, fp32, dataset), dataset)
    clock.lap("quantize")
    return made


def _calibrated(task: QuantizeTask, clock: Clock) -> tuple[Bundle, CalibrationSet]:
    """The FP32 bundle and its calibration set."""
    recipe, given = task.recipe, task.given
    if given is None:
        use_threads(task.machine)
    model = open_or_export(task.source, task.folder, recipe, task.pretrained, task.on_step, task.options)
    planned = (recipe.synthesis.held_out, recipe.text.held_out) if given is None else held_out_counts(given)
    check_measurable(recipe, model.bundle, planned)
    if task.resumed is None or (task.wants_fp16 and task.fp16 is None):
        for file in model.bundle.encoders.values():
            check_source(file, model.bundle.manifest.io[file.name])
    clock.lap("export")
    if given is not None:
        return model.bundle, given
    _, dataset = find_or_synthesize(model, recipe, task.words, task.machine, task.on_step, on_ahead=task.on_ahead)
    return model.bundle, dataset


def _fp16(task: QuantizeTask, fp32: Bundle, dataset: CalibrationSet) -> Bundle | None:
    from d4c_onnx.quantization import write_fp16_bundle

    if task.fp16 is not None or not task.wants_fp16:
        return task.fp16
    return write_fp16_bundle(
        fp32,
        task.fp16_path,
        task.recipe.quantization,
        dataset,
        threads=task.machine.threads,
        overwrite=task.overwrite,
        on_step=task.on_step,
    )
