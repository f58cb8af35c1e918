"""Units of work, and the store that keeps them until the set is whole.

A unit is what one Adam makes: a batch, or all calibration images where the method has one optimiser for all. The store
is a folder beside the set: unit-0003.npz is a finished unit, unit-0003.pt the last checkpoint of one under way.
"""

import shutil
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import torch

from d4c_onnx.calibration.dataset import work_folder
from d4c_onnx.calibration.key import CalibrationKey
from d4c_onnx.files import translate_os_error, write_file, write_json
from d4c_onnx.manifest_file import versions
from d4c_onnx.untrusted_json import holds


@dataclass(frozen=True, slots=True)
class Unit:
    """A set's images `start` to `stop`, which are made together: all of them held out, or none."""

    number: int
    start: int
    stop: int
    held_out: bool

    def __len__(self) -> int:
        return self.stop - self.start


@dataclass(frozen=True, slots=True)
class MadeUnit:
    """A finished unit.

    Attributes:
        unit: which one.
        images: float32 [N, 3, H, W].
        losses: loss terms by name, one value per pass.
    """

    unit: Unit
    images: np.ndarray
    losses: dict[str, list[float]]


def divide(images: int, held_out: int, size: int) -> tuple[Unit, ...]:
    """The units of a set, of at most `size` images each.

    Held-out images have units of their own: how many there are changes no calibration image.
    """
    spans = [(start, min(start + size, images), False) for start in range(0, images, size)]
    total = images + held_out
    spans += [(start, min(start + size, total), True) for start in range(images, total, size)]
    return tuple(Unit(number, *span) for number, span in enumerate(spans))


@dataclass(frozen=True, slots=True)
class UnitStore:
    """Where the units of one set lie while it is being made."""

    folder: Path

    def finished(self, unit: Unit) -> bool:
        """Whether it has been made: by an earlier run, this one, or another process."""
        return self._file(unit).exists()

    def checkpoint(self, unit: Unit) -> Path:
        """Where a unit that is being made keeps its state."""
        return self.folder / f"unit-{unit.number:04d}.pt"

    def save(self, unit: Unit, images: np.ndarray, losses: dict[str, list[float]]) -> None:
        """Keep a finished unit, and drop its checkpoint. images: float32 [N, 3, H, W]."""
        names, values = np.array(list(losses)), np.array(list(losses.values()))
        write_file(self._file(unit), lambda file: np.savez(file, images=images, names=names, losses=values))
        self.checkpoint(unit).unlink(missing_ok=True)

    def load(self, unit: Unit) -> MadeUnit | None:
        """A finished unit, read back; None where it is not there, or not as it was written."""
        try:
            with self._file(unit).open("rb") as file, np.load(file) as content:
                images, names, values = (content[name] for name in ("images", "names", "losses"))
        except Exception:  # numpy raises what the file makes it raise
            return None
        sound = images.dtype == np.float32 and images.ndim == 4 and len(images) == len(unit)
        if not sound or len(names) != len(values) or not np.isfinite(images).all():
            return None
        return MadeUnit(unit, images, dict(zip(names.tolist(), values.tolist(), strict=True)))

    def remove(self) -> None:
        """The set is whole: nothing here is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, unit: Unit) -> Path:
        return self.folder / f"unit-{unit.number:04d}.npz"


def open_unit_store(output_path: Path, key: CalibrationKey, compute: dict[str, str]) -> UnitStore:
    """The store of a set; what an interrupted run left is kept where it would be made again bit for bit, else dropped.

    Args:
        output_path: the set's folder.
        key: everything that was asked for.
        compute: device and precision.

    Raises:
        BundleError: the disk is full, or the place cannot be written.
    """
    folder = work_folder(output_path)
    note = folder / "key.json"
    # torch and thread count decide the last bits of every sum, so they belong to the state of a half-done run
    state = {"key": key.id, "versions": versions(), "threads": torch.get_num_threads(), **compute}
    if not holds(note, state):
        shutil.rmtree(folder, ignore_errors=True)
        try:
            folder.mkdir(parents=True)
        except OSError as error:
            raise translate_os_error(error, output_path) from error
        write_json(note, state)
    return UnitStore(folder)
