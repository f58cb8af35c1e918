"""From finished units, or a control's images, to a calibration set on disk: images, texts, labels, losses."""

from pathlib import Path

import numpy as np

from d4c_onnx.calibration.controls import noise_images
from d4c_onnx.calibration.dataset import CalibrationSet, save_calibration_set
from d4c_onnx.calibration.dead_leaves import dead_leaves
from d4c_onnx.manifest_file import versions
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.models.random_phrases import random_phrases
from d4c_onnx.runtime.preprocess import denormalize, normalize
from d4c_onnx.synthesis.prompts import draw_texts
from d4c_onnx.synthesis.task import Plan
from d4c_onnx.synthesis.units import MadeUnit
from d4c_onnx.vocabulary import templates


def assemble(
    loaded: LoadedModel, target: Path, plan: Plan, made: list[MadeUnit], given: np.ndarray | None
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
        pixels = normalize(dead_leaves(plan.total, loaded.preprocess.size, plan.seed), loaded.preprocess)
    else:
        pixels = noise_images(plan.section.method, (plan.total, 3, *loaded.preprocess.size), plan.seed)
    guided = plan.method is not None and plan.method.loss == "d4c"  # the others are made for no noun
    random = round(plan.text.prompts * plan.text.random_words)
    phrases = random_phrases(loaded.tokenizer, random, np.random.default_rng([plan.seed, 4]))
    texts, held_out_texts = draw_texts(
        plan.nouns, templates(), plan.text.prompts, plan.text.held_out, plan.seed, phrases
    )
    content = CalibrationSet(
        pixel_values=pixels[numbers < plan.section.images],
        held_out=pixels[numbers >= plan.section.images],
        labels=tuple(plan.nouns[label] for label in plan.labels[numbers]) if guided else (),
        texts=tuple(texts),
        input_ids=loaded.cut(loaded.tokenize(texts)),
        held_out_texts=tuple(held_out_texts),
        losses=tuple(one.losses for one in made),
        manifest={"model": loaded.name, "key": plan.key, "compute": plan.compute, "versions": versions()},
    )
    return save_calibration_set(target, content, denormalize(pixels, loaded.preprocess))
