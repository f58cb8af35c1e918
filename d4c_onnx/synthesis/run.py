"""From a loaded model to a calibration set on disk: decide, make units, assemble.

Interrupted runs resume, and on CPUs end with the same files. On CUDA torch has no repeatable gradient of the sampling
that crops and perturbs: the same seed gives images alike.
"""

from pathlib import Path

import numpy as np

from d4c_onnx.calibration.assembly import MadeImages, Subject, assemble, made_control
from d4c_onnx.calibration.dataset import CalibrationSet, open_calibration_set
from d4c_onnx.calibration.method import Method
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.models.random_phrases import random_phrases
from d4c_onnx.progress import OnAhead, OnStep, silent
from d4c_onnx.recipe import PromptConfig, SynthesisConfig
from d4c_onnx.synthesis.make import make_units
from d4c_onnx.synthesis.process_group import ProcessGroup
from d4c_onnx.synthesis.task import Plan, decide
from d4c_onnx.synthesis.units import MadeUnit, open_unit_store


def synthesize(
    loaded: LoadedModel,
    output_path: Path,
    config: SynthesisConfig,
    text: PromptConfig,
    nouns: tuple[str, ...],
    *,
    seed: int,
    device: str = "cpu",
    given: np.ndarray | None = None,
    source_sha256: str | None = None,
    group: ProcessGroup | None = None,
    method: Method | None = None,
    texts: tuple[str, ...] | None = None,
    on_step: OnStep = silent,
    on_ahead: OnAhead | None = None,
) -> CalibrationSet:
    """Make a calibration set for a model from the model itself.

    Args:
        loaded: the model.
        output_path: the set's folder; an existing one is replaced.
        config, text, nouns: the recipe's sections, and the vocabulary; one prompt each.
        seed: of every draw.
        device: cpu, cuda or auto.
        given: method real only: float32 [images + held_out, 3, H, W], ready pixel_values.
        source_sha256: method real only: of what they were read from.
        group: the processes that share the work; none: this one alone.
        method: how images are optimised, instead of what `config.method` names.
        texts: the user's own, in place of nouns in templates.
        on_step, on_ahead: told after each optimiser pass; and before the first one, how long they will take.

    Raises:
        RecipeError: the tower does not have what the recipe asks for, or batches that are not alone are to be shared.
        ModelError: cuda was asked for and is not there.
        BundleError: the disk is full.
    """
    group = group or ProcessGroup()
    plan = decide(
        loaded.weights_sha256,
        config,
        text,
        nouns,
        seed=seed,
        device=device,
        source_sha256=source_sha256,
        method=method,
        processes=group.size,
        texts=texts,
    )
    store = group.rank_zero_first(lambda: open_unit_store(output_path, plan.key, plan.compute))
    made = make_units(loaded, plan, store, group, on_step, on_ahead)
    if group.rank:  # the first process puts the set together
        group.barrier()
        return open_calibration_set(output_path)
    images = _images(plan, loaded, made, given)
    saved = assemble(_subject(loaded), output_path, images, text, nouns, seed=seed, key=plan.key, own_texts=texts)
    store.remove()
    group.barrier()
    return saved


def _images(plan: Plan, loaded: LoadedModel, made: list[MadeUnit], given: np.ndarray | None) -> MadeImages:
    """What finished units hold, in order; a control has none."""
    if plan.method is None:
        return made_control(plan.config, loaded.preprocess, plan.seed, given)
    numbers = np.concatenate([np.arange(one.unit.start, one.unit.stop) for one in made])
    pixels = np.concatenate([one.images for one in made])
    guided = plan.method.loss == "d4c"  # the others are made for no noun
    return MadeImages(
        pixel_values=pixels[numbers < plan.config.images],
        held_out=pixels[numbers >= plan.config.images],
        labels=tuple(plan.nouns[label] for label in plan.labels[numbers]) if guided else (),
        losses=tuple(one.losses for one in made),
        compute=plan.compute,
    )


def _subject(loaded: LoadedModel) -> Subject:
    def rows(texts: list[str]) -> tuple[tuple[int, ...], ...]:
        return loaded.cut(loaded.tokenize(texts))

    def phrases(count: int, rng: np.random.Generator) -> list[str]:
        return random_phrases(loaded.tokenizer, count, rng)

    return Subject(loaded.name, loaded.preprocess, rows, phrases)
