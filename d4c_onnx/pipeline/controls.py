"""Images that ask no model: real ones as ready arrays, which enter here alone, and sets without torch weights."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration.method import METHODS
from d4c_onnx.errors import DatasetError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.progress import Ahead
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords

if TYPE_CHECKING:
    from d4c_onnx.calibration.assembly import Subject
    from d4c_onnx.calibration.dataset import CalibrationSet


def draw_real_images(source: Path, recipe: Recipe, preprocess: Preprocess) -> np.ndarray:
    """The control: pixel_values float32 [images + held_out, 3, H, W] of randomly drawn images, none twice."""
    from d4c_onnx.evaluation.datasets import open_images
    from d4c_onnx.runtime.preprocess import preprocess_image

    found = open_images(source)
    count = recipe.synthesis.images + recipe.synthesis.held_out
    if len(found) < count:
        raise DatasetError(
            f"{source}: holds {len(found)} images; images + held_out are {count}. Bring more, or add "
            "--set synthesis.images=N."
        )
    chosen = np.random.default_rng([recipe.seed, 9]).choice(len(found), count, replace=False)
    batches = found.select(chosen).batches(64)
    upright = recipe.evaluation.exif_rotation
    return np.stack([preprocess_image(image, preprocess, upright) for images in batches for image in images])


def work_ahead(recipe: Recipe, preprocess: Preprocess) -> Ahead:
    """How long images that ask no model will take."""
    from d4c_onnx.calibration.ahead import control_ahead

    return control_ahead(recipe.synthesis, preprocess.size)


def asks_no_model(bundle: Bundle, recipe: Recipe) -> bool:
    """Whether a recipe's set can be made from the bundle alone.

    The ids of its texts must then be those of the model's own tokenizer, and so must the words that stand for nouns:
    they are for CLIP's. An older bundle does not name its cleaning.
    """
    tokenizer = bundle.manifest.tokenizer
    known = tokenizer.type == "clip-bpe" and tokenizer.clean is not None and tokenizer.has_file
    return bundle.imported or (recipe.synthesis.method not in METHODS and known)


def make_control_set(
    bundle: Bundle,
    target: Path,
    recipe: Recipe,
    words: OwnWords,
    source: Path | None,
    digest: str | None,
) -> CalibrationSet:
    """A calibration set for a bundle from images that ask no model, without torch.

    Args:
        target: the set's folder.
        words: nouns, and the user's own texts where there are any.
        source, digest: method real: a folder or file of images, and the SHA-256 of what is in it.

    Raises:
        RecipeError: the recipe's method asks the weights.
    """
    from d4c_onnx.calibration.assembly import make_control

    return make_control(
        _subject_of(bundle),
        bundle.weights_sha256,
        target,
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
