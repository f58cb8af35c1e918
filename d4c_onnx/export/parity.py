"""The written file against torch, on random input and on a person's, at several batch sizes and lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from d4c_onnx.errors import CheckFailed
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.trial import TRIAL_TEXT, trial_pixels

TOLERANCE = 1e-4  # max abs difference of normalised embeddings: the project's bar for FP32
_BATCHES = (1, 2, 7)  # traced at 2; 1 and 7 prove that the batch axis is really dynamic


def check_images(loaded: LoadedModel, file: Path, seed: int) -> float:
    """Run an image encoder and the untouched torch model on the same input.

    Args:
        seed: of the random input.

    Returns:
        The largest absolute difference of normalised embeddings.

    Raises:
        CheckFailed: a difference above 1e-4, or a value that is not finite.
    """
    rng = np.random.default_rng(seed)
    height, width = loaded.preprocess.size
    images = [rng.standard_normal((batch, 3, height, width), dtype=np.float32) for batch in _BATCHES]
    return _compare(
        "image", EncoderSession(file), [*images, trial_pixels(loaded.preprocess)], loaded.model.encode_image
    )


def check_texts(loaded: LoadedModel, file: Path, seed: int) -> float:
    """Run a text encoder and the untouched torch model on the same texts, cut short where its sequence is dynamic.

    Args:
        seed: of the random texts.

    Returns, Raises: as `check_images`.
    """
    rng = np.random.default_rng([seed, 1])
    session = EncoderSession(file)
    texts = [row for batch in _BATCHES for row in _random_texts(rng, loaded, batch, session.fixed_length is None)]
    trial = loaded.tokenize([TRIAL_TEXT])
    texts.append((trial, trial))
    return max(_compare("text", session, [short], loaded.model.encode_text, [full]) for short, full in texts)


def _random_texts(
    rng: np.random.Generator, loaded: LoadedModel, batch: int, dynamic: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(what ONNX is fed, what torch is fed): the same prompts, cut short for ONNX where its sequence is dynamic."""
    words = ["red", "photo", "of", "the", "small", "house", "and", "river", "blue", "seven"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 9))) for _ in range(batch)]
    full = loaded.tokenize(texts)
    if not dynamic:
        return [(full, full)]
    longest = max(len(row) for row in loaded.cut(full))
    return [(full[:, :longest], full), (full, full)]


def _compare(
    tower: str, session: EncoderSession, fed: list[np.ndarray], torch_call: Any, reference: Any = None
) -> float:
    worst = 0.0
    for batch, expected_input in zip(fed, reference or fed, strict=True):
        with torch.no_grad():
            expected = F.normalize(torch_call(torch.from_numpy(np.ascontiguousarray(expected_input))), dim=-1).numpy()
        got = session.run(np.ascontiguousarray(batch))
        got = got / np.maximum(np.linalg.norm(got, axis=-1, keepdims=True), 1e-12)
        difference = float(np.abs(got - expected).max())
        if not difference <= TOLERANCE:  # also true for NaN
            raise CheckFailed(
                f"{tower} encoder, batch {len(batch)}: ONNX and torch differ by {difference:.2e} "
                f"(allowed {TOLERANCE}). Nothing was written; please report the model."
            )
        worst = max(worst, difference)
    return worst
