"""From a loaded model to a calibration set on disk; interrupted runs resume, and on CPUs end with the same files.

On CUDA torch has no repeatable gradient of the sampling that crops and perturbs: the same seed gives images alike.
"""

import json
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import nn

from d4c_onnx.bundle import versions
from d4c_onnx.calibration.controls import noise_images
from d4c_onnx.calibration.dataset import (
    CalibrationSet,
    cut_to_end,
    open_calibration_set,
    save_calibration_set,
    work_folder,
)
from d4c_onnx.calibration.key import calibration_key
from d4c_onnx.calibration.method import METHODS, Method
from d4c_onnx.files import translate_os_error, write_file, write_json
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import PromptSection, SynthesisSection
from d4c_onnx.runtime.preprocess import denormalize
from d4c_onnx.synthesis.coarse import coarse_view
from d4c_onnx.synthesis.compute import prepare_tower, resolve_device, resolve_precision
from d4c_onnx.synthesis.crew import Crew, check_divisible
from d4c_onnx.synthesis.loop import Guide, build_objective, optimize_unit
from d4c_onnx.synthesis.param import start_images
from d4c_onnx.synthesis.perturb import published
from d4c_onnx.synthesis.prompts import draw_labels, draw_texts
from d4c_onnx.synthesis.settling import Settling
from d4c_onnx.synthesis.taps import Taps, keeps_statistics
from d4c_onnx.vocabulary import templates

# images float32 [N, 3, H, W], and their loss terms, one value per pass
Unit = tuple[np.ndarray, dict[str, list[float]]]


def synthesize(
    loaded: LoadedModel,
    target: Path,
    section: SynthesisSection,
    text: PromptSection,
    nouns: tuple[str, ...],
    *,
    seed: int,
    device: str = "cpu",
    given: np.ndarray | None = None,
    source_sha256: str | None = None,
    crew: Crew | None = None,
    method: Method | None = None,
    on_step: OnStep = silent,
) -> CalibrationSet:
    """Make a calibration set for a model from the model itself.

    Args:
        loaded: the model.
        target: the set's folder; an existing one is replaced.
        section, text: the recipe's sections.
        nouns: the vocabulary; one prompt each.
        seed: of every draw.
        device: cpu, cuda or auto.
        given: method real only: float32 [images + held_out, 3, H, W], ready pixel_values.
        source_sha256: method real only: of what they were read from.
        crew: the processes that share the work; none: this one alone.
        method: how images are optimised, instead of what `section.method` names.
        on_step: told after each optimiser pass.

    Raises:
        RecipeError: the recipe asks for what the tower does not have, or for batches that depend on each other where a
            crew shares them or an early stop ends them.
        ModelError: cuda was asked for and is not there.
        BundleError: the disk is full.
    """
    crew = crew or Crew()
    key = calibration_key(loaded.weights_sha256, section, text, nouns, seed, source_sha256, method)
    method = method or METHODS.get(section.method)
    if method:
        check_divisible(section, method, crew)
    total = section.images + section.held_out
    where = resolve_device(device)
    precision = resolve_precision(section.precision, where)
    compute = {"device": where.type, "precision": str(precision).removeprefix("torch.")}
    work = crew.one_by_one(lambda: _work_folder(target, key, compute))
    labels = draw_labels(total, len(nouns), method.labels if method else "stratified", seed)
    chosen = np.arange(total)
    made: list[Unit] = []
    if method:
        chosen, made = _optimize(loaded, section, method, nouns, labels, work, seed, where, precision, crew, on_step)
    if crew.rank:  # the first process puts the set together
        crew.wait()
        return open_calibration_set(target)
    if made:
        pixels = np.concatenate([images for images, _ in made])
    elif given is not None:
        pixels = given
    else:
        pixels = noise_images(section.method, (total, 3, *loaded.preprocess["size"]), seed)
    labels = labels[chosen] if method and method.loss == "d4c" else labels[:0]  # the others are made for no noun
    texts, held_out_texts = draw_texts(nouns, templates(), text.prompts, text.held_out, seed)
    ids = loaded.tokenize(texts)
    end = getattr(loaded.tokenizer, "eot_token_id", None)
    rows = (
        cut_to_end(ids, end)
        if loaded.dynamic_sequence and end is not None
        else tuple(tuple(row) for row in ids.tolist())
    )
    content = CalibrationSet(
        pixel_values=pixels[chosen < section.images],
        held_out=pixels[chosen >= section.images],
        labels=tuple(nouns[index] for index in labels),
        texts=tuple(texts),
        input_ids=rows,
        held_out_texts=tuple(held_out_texts),
        losses=tuple(history for _, history in made),
        manifest={"model": loaded.name, "key": key, "compute": compute, "versions": versions()},
    )
    saved = save_calibration_set(target, content, denormalize(pixels, loaded.preprocess))
    shutil.rmtree(work, ignore_errors=True)
    crew.wait()
    return saved


def _optimize(
    loaded: LoadedModel,
    section: SynthesisSection,
    method: Method,
    nouns: tuple[str, ...],
    labels: np.ndarray,
    work: Path,
    seed: int,
    device: torch.device,
    precision: torch.dtype,
    crew: Crew,
    on_step: OnStep,
) -> tuple[np.ndarray, list[Unit]]:
    """The numbers of the images that were made, and every unit's images and loss terms; finished units are read back.

    In a crew every process makes its share, and the first one reads them all; the others return none. Once the
    statistics have settled, what is left of the calibration images is skipped; held-out ones are made.
    """
    mean, std = (value.to(device) for value in loaded.normalization())
    # The deployed form of the tower: the same numbers, and on CPUs its backward pass is about three times faster
    # than torch's fused attention.
    tower, _ = loaded.deployed_towers()
    guide = _guide(loaded, tower, section, method, nouns, mean, std, device, precision)
    size = section.images if method.shared_optimizer else section.batch
    parts: list[Unit] = []
    chosen: list[int] = []
    settling = Settling(tower) if section.early_stop_tolerance else None
    settled, skipped = False, 0

    def file_of(number: int) -> Path:
        return work / f"unit-{number:04d}.npz"

    def unit(number: int, start: int, stop: int) -> Path:
        """Make a unit, unless an earlier run has; its file."""
        done_file, state_file = file_of(number), work / f"unit-{number:04d}.pt"
        if not done_file.exists():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            shape = (stop - start, 3, *loaded.preprocess["size"])
            images = start_images(method.image, shape, mean, std, generator)
            # counted by their files: those in front of this unit may be another process's, and not made yet
            before = sum(end - first for other, (first, end) in enumerate(spans) if file_of(other).exists())
            report = _reporter(before, skipped, stop - start, len(labels), section.steps, on_step)
            own = torch.from_numpy(labels[start:stop]).to(device)
            made, history = optimize_unit(images, own, guide, section, generator, state_file, report)
            _save_unit(done_file, made.numpy(), history)
            state_file.unlink(missing_ok=True)
        return done_file

    # Held-out images have units of their own: how many there are changes no calibration image.
    groups = ((0, section.images), (section.images, len(labels)))
    spans = [(start, min(start + size, end)) for first, end in groups for start in range(first, end, size)]
    if crew.size > 1:
        for number, (start, stop) in enumerate(spans):
            if crew.mine(number):
                unit(number, start, stop)
        crew.wait()
    if crew.rank:
        return np.array(chosen), parts
    for number, (start, stop) in enumerate(spans):
        if settled and stop <= section.images:
            skipped += stop - start
            continue
        parts.append(_load_unit(unit(number, start, stop)))
        chosen.extend(range(start, stop))
        if settling and section.early_stop_tolerance and not settled and stop <= section.images:
            settled = (
                settling.add(guide.encode, torch.from_numpy(parts[-1][0]).to(device)) < section.early_stop_tolerance
            )
            guide.taps.clear()
    on_step("synthesize", len(labels) * section.steps, len(labels) * section.steps, {"images": len(chosen)})
    return np.array(chosen), parts


def _reporter(
    before: int, skipped: int, count: int, total: int, steps: int, on_step: OnStep
) -> Callable[[int, dict[str, float]], None]:
    """Progress in images times steps; shown are the finished images, image steps per second, and the loss terms.

    Args:
        before: images that were made when the unit began.
        skipped: images that need not be made, since the statistics have settled.
    """
    begun = time.perf_counter()
    passes = 0

    def report(step: int, shown: dict[str, float]) -> None:
        nonlocal passes
        passes += 1  # of this process: a resumed unit's first step is not 1
        rate = passes * count / (time.perf_counter() - begun)
        done = before + (count if step == steps else 0)
        values = {"images": done, "image steps/s": rate, **shown}
        on_step("synthesize", (before + skipped) * steps + count * step, total * steps, values)

    return report


def _guide(
    loaded: LoadedModel,
    tower: nn.Module,
    section: SynthesisSection,
    method: Method,
    nouns: tuple[str, ...],
    mean: torch.Tensor,
    std: torch.Tensor,
    device: torch.device,
    precision: torch.dtype,
) -> Guide:
    objective = build_objective(method, keeps_statistics(tower))
    coarse = coarse_view(tower, loaded.preprocess["size"]) if section.coarse else None
    return Guide(
        encode=prepare_tower(tower, device, precision, coarse),
        texts=embed_prompts(loaded, section.template, nouns).to(device),
        method=method,
        objective=objective,
        perturbations=published(mean, std) if method.pae and method.loss == "d4c" else (),
        taps=Taps(tower, objective.inside),
        coarse=coarse,
    )


def embed_prompts(loaded: LoadedModel, template: str, nouns: tuple[str, ...]) -> torch.Tensor:
    """Unit vectors of one prompt a noun, float32 [K, D], on the CPU."""
    ids = torch.from_numpy(loaded.tokenize([template.format(noun) for noun in nouns]))
    with torch.no_grad():
        return torch.cat([F.normalize(loaded.model.encode_text(part), dim=-1) for part in ids.split(64)])


def _work_folder(target: Path, key: dict[str, Any], compute: dict[str, str]) -> Path:
    """Finished units of an earlier, interrupted run of the very same key are kept; anything else is dropped."""
    work = work_folder(target)
    note = work / "key.json"
    # torch and thread count decide the last bits of every sum, so they belong to the state of a half-done run
    state = {"key": key["id"], "versions": versions(), "threads": torch.get_num_threads(), **compute}
    if not note.exists() or json.loads(note.read_text("utf-8")) != state:
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
        except OSError as error:
            raise translate_os_error(error, target) from error
        write_json(note, state)
    return work


def _save_unit(path: Path, images: np.ndarray, history: dict[str, list[float]]) -> None:
    names, losses = np.array(list(history)), np.array(list(history.values()))
    write_file(path, lambda file: np.savez(file, images=images, names=names, losses=losses))


def _load_unit(path: Path) -> Unit:
    with np.load(path) as unit:
        return unit["images"], dict(zip(unit["names"].tolist(), unit["losses"].tolist(), strict=True))
