"""A model becomes a quantised bundle: decide what there is to do, do it, measure what was made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.extras import need_extra
from d4c_onnx.measure.machine import Machine
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.importing import find_or_import
from d4c_onnx.pipeline.quantize_measure import measure_made
from d4c_onnx.pipeline.quantize_report import QuantizeReport
from d4c_onnx.pipeline.quantize_run import Clock, run
from d4c_onnx.pipeline.quantize_task import decide
from d4c_onnx.pipeline.source import claimed_source
from d4c_onnx.progress import OnAhead, OnStep, silent
from d4c_onnx.recipe import Recipe

if TYPE_CHECKING:
    from d4c_onnx.foreign import ForeignFiles


def quantize_bundle(
    source: str | ForeignFiles,
    recipe: Recipe,
    *,
    output: str | Path,
    pretrained: str | None = None,
    options: ModelOptions | None = None,
    name: str | None = None,
    prompts: str | Path | None = None,
    texts: str | Path | None = None,
    calibration: str | Path | None = None,
    overwrite: bool = False,
    machine: Machine | None = None,
    on_step: OnStep = silent,
    on_ahead: OnAhead | None = None,
) -> QuantizeReport:
    """Quantise both encoders of a model or bundle, and measure the written files against FP32.

    Exports (or imports) first when the model has no bundle yet, synthesises when there is no calibration set of the
    recipe's key. The result goes to `<bundle>/<bits>/`; with `target: cuda` an FP16 bundle goes to `<bundle>/fp16/`,
    too, unless the same one is there from another width.

    Args:
        source: a model's name, an FP32 bundle's path, or ONNX files that others exported.
        options: what the user says of weights, or files, that do not say it themselves.
        name: of the model behind such files; None: that of the folder that both lie in.
        prompts, texts: files of the user's nouns, and of whole texts, which calibrate the text tower in place of nouns.
        calibration: a set's folder; none is then synthesised and torch is not needed for a bundle.
        on_ahead: told before the first image is made how long they will take.

    Raises:
        BundleError: the folder of the result, or of the FP16 bundle, holds something else, or another run is writing.
        ModelError: the model cannot be loaded, or nobody says what its weights or files do not.
        RecipeError: keys contradict the target.
        MissingExtra: torch is needed, and not installed.
        CheckFailed: top-1 or cosine fell by more than is allowed; the files are written, its `report` has the rest.
    """
    if recipe.quantization.learns:
        need_extra("export", f"quantization.rounding {recipe.quantization.rounding}: learning by gradients")
    clock = Clock()
    if not isinstance(source, str):
        found = find_or_import(source, output, recipe, name=name, options=options, on_step=on_step)
        source, options = str(found.path), None
    with claimed_source(source, output):
        task = decide(
            source,
            recipe,
            output=output,
            pretrained=pretrained,
            options=options,
            prompts=prompts,
            texts=texts,
            calibration=calibration,
            overwrite=overwrite,
            machine=machine or Machine(),
            on_step=on_step,
            on_ahead=on_ahead,
        )
        return measure_made(task, run(task, clock), clock)
