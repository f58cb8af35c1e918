"""A package's files under their own names and in their own types: whatever the stack's layout, pixels and ids go in."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path

import numpy as np

from d4c_onnx.packaging.package_manifest import PackagedModel
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.vectors import unit


def feed_of(model: PackagedModel, values: Mapping[str, np.ndarray]) -> dict[str, np.ndarray]:
    """What a file takes.

    Args:
        values: by tower: pixel_values float32 [B, 3, H, W], input_ids int64 [B, sequence]; those of a tower that the
            file lacks are not asked for.
    """
    given = {}
    for entry in model.io.inputs:
        if entry.dtype.startswith("float"):
            given[entry.name] = values["image"].astype(entry.dtype)
        elif "mask" in entry.name:
            given[entry.name] = np.ones(values["text"].shape, entry.dtype)
        else:
            given[entry.name] = values["text"].astype(entry.dtype)
    return given


def output_of(model: PackagedModel, tower: str) -> str:
    """The name of a tower's embedding."""
    return model.io.outputs[0].name if len(model.towers) == 1 else f"{tower}_embeds"


class PackagedSession:
    """One file of a package, loaded as its stack would: without settings that a bundle's manifest may have."""

    def __init__(
        self,
        folder: Path,
        model: PackagedModel,
        idle: Mapping[str, np.ndarray],
        provider: str = "cpu",
        threads: int = 0,
    ) -> None:
        """Load a file.

        Args:
            idle: by tower, one row for the tower that is not asked, where both are in the file.

        Raises:
            BundleError: onnxruntime cannot load it.
        """
        self.model, self._idle = model, idle
        self.encoder = EncoderSession(folder / model.file, provider, threads)

    def embed(self, tower: str, batches: Iterable[np.ndarray]) -> np.ndarray:
        """Unit vectors, float32 [N, D], of pixel_values or input_ids in batches.

        Raises:
            BundleError: onnxruntime refuses a batch, or an answer is not finite.
        """
        parts = []
        for batch in batches:
            answers = self.encoder.run_named(feed_of(self.model, {**self._idle, tower: np.ascontiguousarray(batch)}))
            parts.append(unit(answers[output_of(self.model, tower)].reshape(len(batch), -1)).astype(np.float32))
        return np.concatenate(parts)
