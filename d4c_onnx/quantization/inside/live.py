"""The values that an encoder which runs piece by piece has left alive: in memory, and beyond so many bytes on disk.

A mobile conv net of 256 pixels leaves up to 16 MB an image between two layers: the feature maps of its first stages. Of
128 images, in the float encoder and its quantised twin, that is 4 GB, of which one batch is looked at at a time.
"""

from __future__ import annotations

import shutil
import tempfile
import weakref
from collections.abc import Mapping
from itertools import count
from pathlib import Path

import numpy as np

from d4c_onnx.files import temporary_room

HELD_BYTES = 2**28  # of an encoder; two of them run side by side, so half a gigabyte, as `ranges` looks at


class LiveValues:
    """By batch its values, which are given back as they were.

    Raises:
        BundleError: of what takes new values: there is no room for them on the disk.
    """

    def __init__(self) -> None:
        self._batches: list[dict[str, np.ndarray | Path]] = []
        self._folder: Path | None = None
        self._numbers = count()
        self.held_bytes = 0

    def __len__(self) -> int:
        return len(self._batches)

    def append(self, values: Mapping[str, np.ndarray]) -> None:
        """One more batch."""
        self._batches.append({name: self._kept(value) for name, value in values.items()})

    def read(self, number: int) -> dict[str, np.ndarray]:
        """The values of a batch."""
        return {
            name: np.load(entry) if isinstance(entry, Path) else entry for name, entry in self._batches[number].items()
        }

    def update(self, number: int, fresh: Mapping[str, np.ndarray], later: set[str]) -> None:
        """Let a batch have new values, and keep of all those only that are still needed.

        Args:
            later: their names.
        """
        entries = self._batches[number]
        for name in [name for name in entries if name not in later or name in fresh]:
            self._drop(entries.pop(name))
        entries |= {name: self._kept(value) for name, value in fresh.items() if name in later}

    def _kept(self, value: np.ndarray) -> np.ndarray | Path:
        if self.held_bytes + value.nbytes <= HELD_BYTES:
            self.held_bytes += value.nbytes
            return value
        with temporary_room(value.nbytes) as place:
            if self._folder is None:
                self._folder = Path(tempfile.mkdtemp(prefix="d4c-onnx-", dir=place))
                weakref.finalize(self, shutil.rmtree, self._folder, ignore_errors=True)
            path = self._folder / f"{next(self._numbers)}.npy"
            np.save(path, value)
        return path

    def _drop(self, entry: np.ndarray | Path) -> None:
        if isinstance(entry, Path):
            entry.unlink()
        else:
            self.held_bytes -= entry.nbytes
