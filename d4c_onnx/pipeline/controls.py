"""Images that ask no model: real ones as ready arrays, which enter here alone, and sets without torch weights."""

from __future__ import annotations

from dataclasses import dataclass
from functools import cached_property
from pathlib import Path
from typing import TYPE_CHECKING

import numpy as np
from tokenizers import Tokenizer

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import DatasetError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.progress import Ahead
from d4c_onnx.recipe import Recipe
from d4c_onnx.vocabulary import OwnWords

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet
    from d4c_onnx.synthesis import Subject


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


def make_control_set(
    bundle: Bundle,
    target: Path,
    recipe: Recipe,
    words: OwnWords,
    source: Path | None,
    digest: str | None,
) -> CalibrationSet:
    """A calibration set for an imported bundle, behind which there are no torch weights.

    Args:
        target: the set's folder.
        words: nouns, and the user's own texts where there are any.
        source, digest: method real: a folder or file of images, and the SHA-256 of what is in it.

    Raises:
        RecipeError: the recipe's method asks the weights.
    """
    from d4c_onnx.synthesis import make_control

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
    from d4c_onnx.models.random_phrases import random_phrases
    from d4c_onnx.synthesis import Subject

    words = _Words(bundle.tokenizer)
    context = bundle.manifest.tokenizer.context_length
    dynamic, pad = bundle.manifest.tokenizer.dynamic_sequence, bundle.manifest.tokenizer.pad_id or 0

    def rows(texts: list[str]) -> tuple[tuple[int, ...], ...]:
        found = [tuple(ids) for ids in words.encode(texts)]
        return tuple(row if dynamic else (*row, *[pad] * (context - len(row))) for row in found)

    def phrases(count: int, rng: np.random.Generator) -> list[str]:
        return random_phrases(words, count, rng)

    return Subject(bundle.model_name, bundle.manifest.preprocess, rows, phrases)


@dataclass
class _Words:
    """A tokenizer.json with the names that Hugging Face's classes have."""

    path: Path

    @cached_property
    def _fast(self) -> Tokenizer:
        found = Tokenizer.from_file(str(self.path))
        found.no_padding()
        return found

    @property
    def all_special_ids(self) -> list[int]:
        return [number for number, token in self._fast.get_added_tokens_decoder().items() if token.special]

    def get_vocab(self) -> dict[str, int]:
        return dict(self._fast.get_vocab())

    def decode(self, ids: list[int]) -> str:
        return str(self._fast.decode(ids))

    def encode(self, texts: list[str]) -> list[list[int]]:
        """Ids of each text, cut at the context length and not padded."""
        return [list(encoding.ids) for encoding in self._fast.encode_batch(texts)]
