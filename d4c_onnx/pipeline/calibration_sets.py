"""The calibration set of a recipe's key beside a bundle: found, or made."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.measure.machine import Machine
from d4c_onnx.pipeline.control_sets import asks_no_model, make_control_set
from d4c_onnx.pipeline.controls import draw_real_images, work_ahead
from d4c_onnx.pipeline.lazy_model import LazyModel
from d4c_onnx.progress import Ahead, OnAhead, OnStep
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.synthesis import ProcessGroup


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
    output_path = bundle.path / f"calibration-{key.id}"
    if output_path.exists():
        if on_ahead is not None:
            on_ahead(Ahead(recipe.synthesis.method, 0, 0, 0.0))
        return output_path, open_calibration_set(output_path)
    if on_ahead is not None and key.method is None:
        on_ahead(work_ahead(recipe, bundle.manifest.preprocess))
    if asks_no_model(model, recipe):

        def control() -> CalibrationSet:
            if output_path.exists():  # another process of the group was first
                return open_calibration_set(output_path)
            return make_control_set(bundle, output_path, recipe, OwnWords(nouns, words.texts), source, digest)

        return output_path, control() if group is None else group.rank_zero_first(control)
    loaded = model.load(on_step)  # first: it says what to install
    from d4c_onnx.synthesis import synthesize

    made = synthesize(
        loaded,
        output_path,
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
    return output_path, made
