"""From a loaded model to a calibration set on disk; interrupted runs resume and end with the same files."""

import json
import os
import shutil
from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from d4c_onnx.bundle import versions
from d4c_onnx.calibration.dataset import CalibrationSet, cut_to_end, save_calibration_set
from d4c_onnx.calibration.key import calibration_key
from d4c_onnx.errors import ModelError, RecipeError
from d4c_onnx.files import translate_os_error, write_json
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.recipe import PromptSection, SynthesisSection
from d4c_onnx.synthesis.loop import Guide, build_objective, optimize_unit
from d4c_onnx.synthesis.param import start_images
from d4c_onnx.synthesis.perturb import published
from d4c_onnx.synthesis.prompts import draw_labels, draw_texts
from d4c_onnx.vocabulary import templates


def synthesize(
    loaded: LoadedModel,
    target: Path,
    section: SynthesisSection,
    text: PromptSection,
    nouns: tuple[str, ...],
    *,
    seed: int,
    device: str = "cpu",
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
        on_step: told after each optimiser pass.

    Raises:
        RecipeError: the recipe's components contradict each other.
        ModelError: cuda was asked for and is not there.
        BundleError: the disk is full.
    """
    if section.method == "d4c" and not section.pgsi:
        raise RecipeError("synthesis.pgsi: false leaves nothing to aim at. Use synthesis.method: noise, or pgsi: true.")
    key = calibration_key(loaded.weights_sha256, section, text, nouns, seed)
    total = section.images + section.held_out
    work = _work_folder(target, key)
    labels = draw_labels(total, len(nouns), section.labels, seed)
    if section.method in ("noise", "pink"):
        pixels = noise_images(section.method, (total, 3, *loaded.preprocess["size"]), seed)
        labels = labels[:0]
    else:
        pixels = _optimize(loaded, section, nouns, labels, work, seed, resolve_device(device), on_step)
    texts, held_out_texts = draw_texts(nouns, templates(), text.prompts, text.held_out, seed)
    ids = loaded.tokenize(texts)
    dynamic = loaded.deployed_towers()[1].dynamic_sequence
    end = getattr(loaded.tokenizer, "eot_token_id", None)
    rows = cut_to_end(ids, end) if dynamic and end is not None else tuple(tuple(row) for row in ids.tolist())
    mean, std = (np.array(loaded.preprocess[name], np.float32)[:, None, None] for name in ("mean", "std"))
    content = CalibrationSet(
        pixel_values=pixels[: section.images],
        held_out=pixels[section.images :],
        labels=tuple(nouns[index] for index in labels),
        texts=tuple(texts),
        input_ids=rows,
        held_out_texts=tuple(held_out_texts),
        manifest={"model": loaded.name, "key": key, "versions": versions()},
    )
    saved = save_calibration_set(target, content, pixels * std + mean)
    shutil.rmtree(work, ignore_errors=True)
    return saved


def resolve_device(device: str) -> torch.device:
    """cpu, cuda or auto to a torch device.

    Raises:
        ModelError: cuda was asked for and torch sees none.
    """
    if device == "cuda" and not torch.cuda.is_available():
        raise ModelError("--device cuda: torch sees no CUDA device. Use --device cpu.")
    return torch.device("cuda" if device != "cpu" and torch.cuda.is_available() else "cpu")


def noise_images(method: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Images that know nothing of the model, float32 of `shape` in the normalised space: the controls.

    Args:
        method: noise: N(0, 1), every pixel on its own. pink: amplitude falls with 1 / f, as it does in photographs;
            each channel with mean 0 and standard deviation 1.
    """
    white = np.random.default_rng([seed, 3]).standard_normal(shape, dtype=np.float32)
    if method == "noise":
        return white
    height, width = shape[2:]
    frequency = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    frequency[0, 0] = np.inf  # no mean
    pink = np.fft.irfft2(np.fft.rfft2(white) / frequency, s=(height, width))
    return (pink / pink.std((2, 3), keepdims=True)).astype(np.float32)


def _optimize(
    loaded: LoadedModel,
    section: SynthesisSection,
    nouns: tuple[str, ...],
    labels: np.ndarray,
    work: Path,
    seed: int,
    device: torch.device,
    on_step: OnStep,
) -> np.ndarray:
    mean, std = (torch.tensor(loaded.preprocess[name]).view(3, 1, 1).to(device) for name in ("mean", "std"))
    guide = _guide(loaded, section, nouns, mean, std, device)
    size = len(labels) if section.shared_optimizer else section.batch
    parts: list[np.ndarray] = []
    for number, start in enumerate(range(0, len(labels), size)):
        own = labels[start : start + size]
        done_file, state_file = work / f"unit-{number:04d}.npy", work / f"unit-{number:04d}.pt"
        if not done_file.exists():
            generator = torch.Generator().manual_seed(seed * 1_000_003 + number)
            shape = (len(own), 3, *loaded.preprocess["size"])
            images = start_images(section.image, shape, mean, std, generator)

            def report(step: int, shown: dict[str, float], base: int = start, width: int = len(own)) -> None:
                on_step("synthesize", base * section.steps + width * step, len(labels) * section.steps, shown)

            try:
                labels_here = torch.from_numpy(own).to(device)
                made = optimize_unit(images, labels_here, guide, section, generator, state_file, report)
                _save_unit(done_file, made.numpy())
            except OSError as error:
                raise translate_os_error(error, work) from error
            state_file.unlink(missing_ok=True)
        parts.append(np.load(done_file))
    return np.concatenate(parts)


def _guide(
    loaded: LoadedModel,
    section: SynthesisSection,
    nouns: tuple[str, ...],
    mean: torch.Tensor,
    std: torch.Tensor,
    device: torch.device,
) -> Guide:
    # The deployed form of the tower: the same numbers, and on CPUs its backward pass is about three times faster
    # than torch's fused attention.
    image, _ = loaded.deployed_towers()
    ids = torch.from_numpy(loaded.tokenize([section.template.format(noun) for noun in nouns]))
    with torch.no_grad():
        texts = torch.cat([F.normalize(loaded.model.encode_text(part), dim=-1) for part in ids.split(64)])
    perturbations = published(mean, std) if section.pae else ()
    view = "box" if section.scg else "whole"
    return Guide(image.to(device), texts.to(device), build_objective(section), perturbations, view)


def _work_folder(target: Path, key: dict[str, Any]) -> Path:
    """Finished units of an earlier, interrupted run of the very same key are kept; anything else is dropped."""
    work = target.with_name(f".work-{target.name}")
    note = work / "key.json"
    # torch and thread count decide the last bits of every sum, so they belong to the state of a half-done run
    state = {"key": key["id"], "versions": versions(), "threads": torch.get_num_threads()}
    if not note.exists() or json.loads(note.read_text("utf-8")) != state:
        shutil.rmtree(work, ignore_errors=True)
        try:
            work.mkdir(parents=True)
        except OSError as error:
            raise translate_os_error(error, target) from error
        write_json(note, state)
    return work


def _save_unit(path: Path, images: np.ndarray) -> None:
    temporary = path.with_suffix(".tmp")
    with temporary.open("wb") as file:
        np.save(file, images)
        file.flush()
        os.fsync(file.fileno())
    temporary.rename(path)
