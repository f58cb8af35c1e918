"""A tower's file as it came, run by onnxruntime: what every rewritten graph must answer like."""

from __future__ import annotations

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import BundleError, CheckFailed, ModelError
from d4c_onnx.foreign.tower import Original
from d4c_onnx.graph.model import drop_unused, load_model
from d4c_onnx.graph.values import ancestors
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.vectors import unit
from d4c_onnx.untrusted_json import short

TOLERANCE = 1e-4  # max abs difference of unit vectors: as between torch and our own exports


class OriginalTower:
    """The file, loaded."""

    def __init__(self, original: Original) -> None:
        """Raises: BundleError: onnxruntime cannot load it."""
        self.original = original
        alone = original.alone
        self._session = EncoderSession(original.path) if alone else EncoderSession.of_model(_alone(original))

    def __call__(self, batch: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Embeddings as unit vectors, float32 [batch, width].

        Args:
            batch: float32 [batch, 3, H, W] or int64 [batch, length].
            mask: int64 [batch, length], 1 for a token that counts; None: all of them.

        Raises:
            ModelError: the file does not run on it.
        """
        return unit(self.raw(batch, mask))

    def raw(self, batch: np.ndarray, mask: np.ndarray | None = None) -> np.ndarray:
        """Embeddings as the file gives them, float32 [batch, width]."""
        given = {
            "pixels": batch,
            "ids": batch,
            "mask": np.ones_like(batch) if mask is None else mask,
            "type": np.zeros_like(batch),
            "position": self._positions(batch),
        }
        feed = {name: given[what].astype(self.original.dtypes[what]) for what, name in self.original.inputs.items()}
        try:
            found = self._session.run_named({name: feed[name] for name in self._session.input_names})[
                self.original.output
            ]
        except BundleError as error:
            reason = short(error.__cause__ or error)
            raise ModelError(
                f"{self.original.path}: does not run on {batch.dtype} {list(batch.shape)} ({reason}). "
                "Are its tokenizer and its image size the right ones?"
            ) from error
        if found.ndim != 2 or found.shape[0] != len(batch):
            raise ModelError(
                f"{self.original.path}: {self.original.output} is {list(found.shape)}, not [batch, width]. Name "
                "another output."
            )
        return found

    def _positions(self, batch: np.ndarray) -> np.ndarray:
        """0, 1, ... along the second axis."""
        shape = (1 if self.original.shared_positions else len(batch), batch.shape[1])
        return np.broadcast_to(np.arange(batch.shape[1]), shape)


def _alone(original: Original) -> ir.Model:
    """The file's graph without what its other outputs need."""
    model = load_model(original.path)
    chosen = [value for value in model.graph.outputs if value.name == original.output]
    model.graph.outputs.clear()
    model.graph.outputs.extend(chosen)
    drop_unused(model)
    used = ancestors(chosen)
    for value in [entry for entry in model.graph.inputs if entry not in used]:
        model.graph.inputs.remove(value)
    return model


def check_same(tower: str, expected: np.ndarray, found: np.ndarray) -> float:
    """The largest absolute difference of unit vectors.

    Raises:
        CheckFailed: above 1e-4.
        BundleError: a value is not finite.
    """
    difference = float(np.abs(unit(found) - unit(expected)).max())
    if difference > TOLERANCE:
        raise CheckFailed(
            f"{tower} encoder, batch {len(expected)}: the rewritten graph and the file differ by {difference:.2e} "
            f"(allowed {TOLERANCE}). Nothing was written; please report the model."
        )
    return difference
