"""The calibration set of a recipe's key beside a bundle: found, or made."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.measure.machine import Machine
from d4c_onnx.pipeline.control_images import draw_real_images, work_ahead
from d4c_onnx.pipeline.control_sets import asks_no_model, make_control_set
from d4c_onnx.pipeline.lazy_model import LazyModel
from d4c_onnx.progress import Ahead, OnAhead, OnStep
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.calibration.key import CalibrationKey
    from d4c_onnx.synthesis import ProcessGroup


@dataclass(frozen=True, slots=True)
class _Asked:
    """A set that is asked for.

    Attributes:
        words: the vocabulary, the user's or the model's own, and the user's texts.
        source: real images, where they are asked for.
        digest: of what lies there.
        key: all of it.
        output_path: where such a set lies.
    """

    words: OwnWords
    source: Path | None
    digest: str | None
    key: CalibrationKey
    output_path: Path


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

    asked = _asked(model, recipe, words)
    if asked.output_path.exists():
        if on_ahead is not None:
            on_ahead(Ahead(recipe.synthesis.method, 0, 0, 0.0))
        return asked.output_path, open_calibration_set(asked.output_path)
    if on_ahead is not None and asked.key.method is None:
        on_ahead(work_ahead(recipe, model.bundle.manifest.preprocess))
    if not asks_no_model(model, recipe):
        return asked.output_path, _synthesized(model, recipe, asked, machine, on_step, group, on_ahead)
    control = partial(_control, model, recipe, asked)
    return asked.output_path, control() if group is None else group.rank_zero_first(control)


def _asked(model: LazyModel, recipe: Recipe, words: OwnWords) -> _Asked:
    from d4c_onnx.calibration.key import calibration_key
    from d4c_onnx.evaluation.datasets import content_sha256

    bundle = model.bundle
    nouns = words.nouns or model.own_nouns()
    source = Path(recipe.synthesis.source) if recipe.synthesis.source else None
    digest = content_sha256(source) if source else None
    if digest and recipe.evaluation.exif_rotation:
        digest = f"{digest} upright"  # other images to the model, so another set
    named = recipe.synthesis, recipe.text, nouns, recipe.seed, digest
    key = calibration_key(bundle.weights_sha256, *named, texts=words.texts)
    return _Asked(OwnWords(nouns, words.texts), source, digest, key, bundle.path / f"calibration-{key.id}")


def _control(model: LazyModel, recipe: Recipe, asked: _Asked) -> CalibrationSet:
    from d4c_onnx.calibration.dataset import open_calibration_set

    if asked.output_path.exists():  # another process of the group was first
        return open_calibration_set(asked.output_path)
    return make_control_set(model.bundle, asked.output_path, recipe, asked.words, asked.source, asked.digest)


def _synthesized(
    model: LazyModel,
    recipe: Recipe,
    asked: _Asked,
    machine: Machine,
    on_step: OnStep,
    group: ProcessGroup | None,
    on_ahead: OnAhead | None,
) -> CalibrationSet:
    loaded = model.load(on_step)  # first: it says what to install
    from d4c_onnx.synthesis import synthesize

    return synthesize(
        loaded,
        asked.output_path,
        recipe.synthesis,
        recipe.text,
        asked.key.nouns,
        seed=recipe.seed,
        device=machine.device,
        given=draw_real_images(asked.source, recipe, loaded.preprocess) if asked.source else None,
        source_sha256=asked.digest,
        group=group,
        texts=asked.words.texts,
        on_step=on_step,
        on_ahead=on_ahead,
    )
