"""A model becomes a calibration set in its bundle's folder; a set of the same key is there for good."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.measure.machine import Machine
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.pipeline.controls import asks_no_model, draw_real_images, make_control_set, work_ahead
from d4c_onnx.pipeline.exporting import use_threads
from d4c_onnx.pipeline.source import LazyModel, claimed_source, open_or_export, without_model
from d4c_onnx.progress import Ahead, OnAhead, OnStep, silent
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords, read_words

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.synthesis import ProcessGroup


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


def find_or_synthesize(
    model: LazyModel,
    recipe: Recipe,
    words: OwnWords,
    machine: Machine,
    on_step: OnStep,
    group: ProcessGroup | None = None,
    on_ahead: OnAhead | None = None,
) -> tuple[Path, CalibrationSet]:
    """The set of a recipe's key beside a bundle: the one that is there, or a new one."""
    from d4c_onnx.calibration.dataset import open_calibration_set
    from d4c_onnx.calibration.key import calibration_key
    from d4c_onnx.evaluation.datasets import content_sha256

    bundle = model.bundle
    nouns = words.nouns or model.own_nouns()
    source = Path(recipe.synthesis.source) if recipe.synthesis.source else None
    digest = content_sha256(source) if source else None
    if digest and recipe.evaluation.exif_rotation:
        digest = f"{digest} upright"  # other images to the model, so another set
    asked = recipe.synthesis, recipe.text, nouns, recipe.seed, digest
    key = calibration_key(bundle.weights_sha256, *asked, texts=words.texts)
    target = bundle.path / f"calibration-{key['id']}"
    if target.exists():
        if on_ahead is not None:
            on_ahead(Ahead(recipe.synthesis.method, 0, 0, 0.0))
        return target, open_calibration_set(target)
    if on_ahead is not None and key["method"] is None:
        on_ahead(work_ahead(recipe, bundle.manifest.preprocess))
    if asks_no_model(bundle, recipe):

        def control() -> CalibrationSet:
            if target.exists():  # another process of the group was first
                return open_calibration_set(target)
            return make_control_set(bundle, target, recipe, OwnWords(nouns, words.texts), source, digest)

        return target, control() if group is None else group.rank_zero_first(control)
    loaded = model.load(on_step)  # first: it says what to install
    from d4c_onnx.synthesis import synthesize

    made = synthesize(
        loaded,
        target,
        recipe.synthesis,
        recipe.text,
        nouns,
        seed=recipe.seed,
        device=machine.device,
        given=draw_real_images(source, recipe, loaded.preprocess) if source else None,
        source_sha256=digest,
        group=group,
        texts=words.texts,
        on_step=on_step,
        on_ahead=on_ahead,
    )
    return target, made
