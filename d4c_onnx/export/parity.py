"""The written file against torch, on random and on golden input, at several batch sizes and lengths."""

from pathlib import Path
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F

from d4c_onnx.errors import CheckFailed
from d4c_onnx.models.load import LoadedModel
from d4c_onnx.runtime.session import EncoderSession

TOLERANCE = 1e-4  # max abs difference of normalised embeddings: the project's bar for FP32
_BATCHES = (1, 2, 7)  # traced at 2; 1 and 7 prove that the batch axis is really dynamic


def check_parity(
    loaded: LoadedModel, image_file: Path, text_file: Path, golden: dict[str, Any], seed: int
) -> dict[str, float]:
    """Run both files and the untouched torch model on the same input.

    Args:
        golden: `pixel_values` float32 [1, 3, H, W] and `input_ids` int64 [1, context_length].
        seed: of the random input.

    Returns:
        The largest absolute difference of normalised embeddings per tower.

    Raises:
        CheckFailed: a difference above 1e-4, or a value that is not finite.
    """
    rng = np.random.default_rng(seed)
    height, width = loaded.preprocess.size
    images = [rng.standard_normal((batch, 3, height, width), dtype=np.float32) for batch in _BATCHES]
    images.append(golden["pixel_values"])
    worst = {"image": _compare("image", EncoderSession(image_file), images, loaded.model.encode_image)}
    session = EncoderSession(text_file)
    texts = [row for batch in _BATCHES for row in _random_texts(rng, loaded, batch, session.fixed_length is None)]
    texts.append((golden["input_ids"], golden["input_ids"]))
    worst["text"] = max(_compare("text", session, [short], loaded.model.encode_text, [full]) for short, full in texts)
    return worst


def _random_texts(
    rng: np.random.Generator, loaded: LoadedModel, batch: int, dynamic: bool
) -> list[tuple[np.ndarray, np.ndarray]]:
    """(what ONNX is fed, what torch is fed): the same prompts, cut short for ONNX where its sequence is dynamic."""
    words = ["red", "photo", "of", "the", "small", "house", "and", "river", "blue", "seven"]
    texts = [" ".join(rng.choice(words, size=rng.integers(1, 9))) for _ in range(batch)]
    full = loaded.tokenize(texts)
    lengths = (full != 0).sum(1)
    if not dynamic:
        return [(full, full)]
    return [(full[:, : int(lengths.max())], full), (full, full)]


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
