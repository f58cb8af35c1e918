"""From images, however they were made, to a calibration set on disk: texts are drawn, key and versions put beside.

Controls, whose images ask no model, are made here from end to end: for a bundle they need no torch.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from pathlib import Path

import numpy as np

from d4c_onnx.calibration.controls import control_images
from d4c_onnx.calibration.dataset import CalibrationSet, save_calibration_set
from d4c_onnx.calibration.key import CalibrationKey, calibration_key
from d4c_onnx.calibration.method import METHODS
from d4c_onnx.calibration.prompts import draw_texts, split_texts
from d4c_onnx.calibration.set_file import SetManifest
from d4c_onnx.errors import RecipeError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.manifest_file import versions
from d4c_onnx.recipe import PromptConfig, SynthesisConfig
from d4c_onnx.runtime.preprocess import denormalize
from d4c_onnx.vocabulary import templates


@dataclass(frozen=True, slots=True)
class Subject:
    """What a set is for: all that is asked of a model once its images are made.

    Attributes:
        name: the model's.
        preprocess: from an image to what its image tower takes.
        rows: ids of each text, without what the tower does not look at (or at fixed length).
        phrases: so many texts of random tokens, drawn with a generator; fewer, where the tokenizer gives no text back.
    """

    name: str
    preprocess: Preprocess
    rows: Callable[[list[str]], tuple[tuple[int, ...], ...]]
    phrases: Callable[[int, np.random.Generator], list[str]]


@dataclass(frozen=True, slots=True)
class MadeImages:
    """The images of a set.

    Attributes:
        pixel_values, held_out: float32 [N, 3, H, W] and [M, 3, H, W].
        labels: the noun each image was made for, N + M of them; empty where they were made for none.
        losses: of each unit of synthesis, by name; empty for controls.
        compute: device and precision that they were made with; empty for controls.
    """

    pixel_values: np.ndarray
    held_out: np.ndarray
    labels: tuple[str, ...] = ()
    losses: tuple[dict[str, list[float]], ...] = ()
    compute: Mapping[str, str] = field(default_factory=dict)


def assemble(
    subject: Subject,
    output_path: Path,
    images: MadeImages,
    text: PromptConfig,
    nouns: tuple[str, ...],
    *,
    seed: int,
    key: CalibrationKey,
    own_texts: tuple[str, ...] | None = None,
) -> CalibrationSet:
    """Write the set.

    Args:
        output_path: its folder; an existing one is replaced.
        nouns: the vocabulary.
        key: everything that was asked for.
        own_texts: the user's own, in place of nouns in templates.

    Raises:
        CalibrationError: an image holds a value that is not finite.
        BundleError: the disk is full or the place cannot be written.
    """
    if own_texts is not None:
        texts, held_out_texts = split_texts(own_texts, text.prompts, text.held_out, seed)
    else:
        phrases = subject.phrases(round(text.prompts * text.random_words), np.random.default_rng([seed, 4]))
        texts, held_out_texts = draw_texts(nouns, templates(), text.prompts, text.held_out, seed, phrases)
    content = CalibrationSet(
        pixel_values=images.pixel_values,
        held_out=images.held_out,
        labels=images.labels,
        texts=tuple(texts),
        input_ids=subject.rows(texts),
        held_out_texts=tuple(held_out_texts),
        losses=images.losses,
        manifest=SetManifest(subject.name, key, dict(images.compute), versions()),
    )
    preview = denormalize(np.concatenate([images.pixel_values, images.held_out]), subject.preprocess)
    return save_calibration_set(output_path, content, preview)


def made_control(
    config: SynthesisConfig, preprocess: Preprocess, seed: int, given: np.ndarray | None = None
) -> MadeImages:
    """The images of a method that asks no model.

    Args:
        given: method real: float32 [images + held_out, 3, H, W], ready pixel_values.
    """
    total = config.images + config.held_out
    pixels = control_images(config.method, total, preprocess, seed) if given is None else given
    return MadeImages(pixels[: config.images], pixels[config.images :])


def make_control(
    subject: Subject,
    weights_sha256: str,
    output_path: Path,
    config: SynthesisConfig,
    text: PromptConfig,
    nouns: tuple[str, ...],
    *,
    seed: int,
    given: np.ndarray | None = None,
    source_sha256: str | None = None,
    texts: tuple[str, ...] | None = None,
) -> CalibrationSet:
    """Make a calibration set of images that ask no model.

    Args:
        subject: what the set is for.
        weights_sha256: of its bundle.
        output_path: the set's folder; an existing one is replaced.
        config, text: the recipe's sections.
        nouns: the vocabulary.
        seed: of every draw.
        given, source_sha256: method real: ready pixel_values, and the SHA-256 of what they were read from.
        texts: the user's own, in place of nouns in templates.

    Raises:
        RecipeError: the recipe's method asks the model.
        BundleError: the disk is full.
    """
    if config.method in METHODS:
        raise RecipeError(f"synthesis.method {config.method}: needs torch weights. Use leaves, noise, pink or real.")
    key = calibration_key(weights_sha256, config, text, nouns, seed, source_sha256, texts=texts)
    images = made_control(config, subject.preprocess, seed, given)
    return assemble(subject, output_path, images, text, nouns, seed=seed, key=key, own_texts=texts)
