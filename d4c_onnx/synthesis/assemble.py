"""From finished units, or a control's images, to a calibration set on disk: images, texts, labels, losses."""

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from d4c_onnx.calibration.controls import noise_images
from d4c_onnx.calibration.dataset import CalibrationSet, save_calibration_set
from d4c_onnx.calibration.dead_leaves import dead_leaves
from d4c_onnx.manifest import Preprocess
from d4c_onnx.manifest_file import versions
from d4c_onnx.runtime.preprocess import denormalize, normalize
from d4c_onnx.synthesis.prompts import draw_texts, split_texts
from d4c_onnx.synthesis.task import Plan
from d4c_onnx.synthesis.units import MadeUnit
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


def assemble(
    subject: Subject, target: Path, plan: Plan, made: list[MadeUnit], given: np.ndarray | None
) -> CalibrationSet:
    """Write the set.

    Args:
        target: its folder; an existing one is replaced.
        made: in order; empty for controls.
        given: method real: float32 [images + held_out, 3, H, W].

    Raises:
        CalibrationError: an image holds a value that is not finite.
        BundleError: the disk is full or the place cannot be written.
    """
    numbers = np.arange(plan.total)
    if made:
        numbers = np.concatenate([numbers[one.unit.start : one.unit.stop] for one in made])
        pixels = np.concatenate([one.images for one in made])
    elif given is not None:
        pixels = given
    elif plan.section.method == "leaves":
        pixels = normalize(dead_leaves(plan.total, subject.preprocess.size, plan.seed), subject.preprocess)
    else:
        pixels = noise_images(plan.section.method, (plan.total, 3, *subject.preprocess.size), plan.seed)
    guided = plan.method is not None and plan.method.loss == "d4c"  # the others are made for no noun
    texts, held_out_texts = _texts(subject, plan)
    content = CalibrationSet(
        pixel_values=pixels[numbers < plan.section.images],
        held_out=pixels[numbers >= plan.section.images],
        labels=tuple(plan.nouns[label] for label in plan.labels[numbers]) if guided else (),
        texts=tuple(texts),
        input_ids=subject.rows(texts),
        held_out_texts=tuple(held_out_texts),
        losses=tuple(one.losses for one in made),
        manifest={"model": subject.name, "key": plan.key, "compute": plan.compute, "versions": versions()},
    )
    return save_calibration_set(target, content, denormalize(pixels, subject.preprocess))


def _texts(subject: Subject, plan: Plan) -> tuple[list[str], list[str]]:
    """Calibration prompts and held-out ones: the user's own texts, or nouns and random words in templates."""
    if plan.texts is not None:
        return split_texts(plan.texts, plan.text.prompts, plan.text.held_out, plan.seed)
    random = round(plan.text.prompts * plan.text.random_words)
    phrases = subject.phrases(random, np.random.default_rng([plan.seed, 4]))
    return draw_texts(plan.nouns, templates(), plan.text.prompts, plan.text.held_out, plan.seed, phrases)
