"""A model becomes a calibration set in its bundle's folder; a set of the same key is there for good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.measure.machine import Machine
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.calibration_sets import find_or_synthesize
from d4c_onnx.pipeline.exporting import use_threads
from d4c_onnx.pipeline.source import claimed_source, open_or_export, without_model
from d4c_onnx.progress import OnAhead, OnStep, silent
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import read_words

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


def synthesize_calibration_set(
    source: str,
    recipe: Recipe,
    *,
    output: str | Path,
    pretrained: str | None = None,
    options: ModelOptions | None = None,
    prompts: str | Path | None = None,
    texts: str | Path | None = None,
    machine: Machine | None = None,
    on_step: OnStep = silent,
    on_ahead: OnAhead | None = None,
) -> tuple[Path, CalibrationSet]:
    """Make a calibration set in the model's bundle folder, or return the one of the same key that is there.

    Exports first when the model has no bundle yet: a set always lies beside the encoders it is for.

    Args:
        source: a model's name, or the path of an FP32 bundle (its model is loaded again).
        options: what the user says of weights that do not say it themselves.
        prompts: the user's vocabulary: a file of nouns.
        texts: a file of the user's own texts, which calibrate the text tower in place of nouns in templates.
        on_ahead: told before the first image is made how long they will take; timing that makes no other images.

    Returns:
        The set's folder, and the set.

    Raises:
        BundleError: the folder is in the way, cannot be written, or another run is writing it.
    """
    machine = machine or Machine()
    words = read_words(prompts, texts)
    with claimed_source(source, output, machine.rank) as folder:
        recipe = without_model(folder, recipe)
        use_threads(machine)
        if machine.world_size == 1:
            model = open_or_export(source, folder, recipe, pretrained, on_step, options)
            return find_or_synthesize(model, recipe, words, machine, on_step, on_ahead=on_ahead)
        from d4c_onnx.synthesis import init_process_group

        group = init_process_group(machine.rank, machine.world_size, machine.local_rank)
        model = group.rank_zero_first(lambda: open_or_export(source, folder, recipe, pretrained, on_step, options))
        return find_or_synthesize(model, recipe, words, machine, on_step, group, on_ahead)
