"""Calibration sets of images that ask no model, made for a bundle without torch."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.method import METHODS
from d4c_onnx.models.model_options import is_local
from d4c_onnx.pipeline.control_images import draw_real_images
from d4c_onnx.pipeline.lazy_model import LazyModel
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords

if TYPE_CHECKING:
    import numpy as np

    from d4c_onnx.calibration.assembly import Subject
    from d4c_onnx.calibration.dataset import CalibrationSet


def asks_no_model(model: LazyModel, recipe: Recipe) -> bool:
    """Whether a recipe's set is made from the bundle alone.

    The ids of its texts must then be those of the model's own tokenizer, and so must the words that stand for nouns:
    they are for CLIP's. An older bundle does not name its cleaning. A folder that the user named may hold other weights
    by now: those are looked at.
    """
    if model.bundle.imported:
        return True
    tokenizer = model.bundle.manifest.tokenizer
    known = tokenizer.type == "clip-bpe" and tokenizer.clean is not None and tokenizer.has_file
    named = model.asked is not None and is_local(model.asked)
    return recipe.synthesis.method not in METHODS and known and not named


def make_control_set(
    bundle: Bundle,
    output_path: Path,
    recipe: Recipe,
    words: OwnWords,
    source: Path | None,
    digest: str | None,
) -> CalibrationSet:
    """A calibration set for a bundle from images that ask no model, without torch.

    Args:
        output_path: the set's folder.
        words: nouns, and the user's own texts where there are any.
        source, digest: method real: a folder or file of images, and the SHA-256 of what is in it.

    Raises:
        RecipeError: the recipe's method asks the weights.
    """
    from d4c_onnx.calibration.assembly import make_control

    return make_control(
        _subject_of(bundle),
        bundle.weights_sha256,
        output_path,
        recipe.synthesis,
        recipe.text,
        words.nouns or (),
        seed=recipe.seed,
        given=draw_real_images(source, recipe, bundle.manifest.preprocess) if source else None,
        source_sha256=digest,
        texts=words.texts,
    )


def _subject_of(bundle: Bundle) -> Subject:
    """What calibration images and texts are for, where there is a bundle and no torch model."""
    from d4c_onnx.calibration.assembly import Subject
    from d4c_onnx.models.random_phrases import random_phrases
    from d4c_onnx.runtime.tokenizer import TextTokenizer

    tokenizer = TextTokenizer(bundle.tokenizer, bundle.manifest.tokenizer)

    def rows(texts: list[str]) -> tuple[tuple[int, ...], ...]:
        # one by one: what is as long as itself needs no padding
        return tuple(tuple(tokenizer([text])[0].tolist()) for text in texts)

    def phrases(count: int, rng: np.random.Generator) -> list[str]:
        return random_phrases(tokenizer, count, rng)

    return Subject(bundle.model_name, bundle.manifest.preprocess, rows, phrases)
