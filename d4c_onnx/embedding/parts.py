"""Finished work of an embedding, in parts: each is written whole or not at all, and together they become the result.

<output>.parts/
  ask.json          what was asked: another ask does not go on with these parts
  00000.npy         float32 [N, D]
  00000.json        names of the vectors, and what was broken
"""

import json
import shutil
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any, BinaryIO

import numpy as np

from d4c_onnx.files import translate_os_error, write_file, write_json

_ASK = "ask.json"


@dataclass(frozen=True, slots=True)
class Part:
    """So many items of the source.

    Attributes:
        names: of the vectors.
        broken: name and reason of each item that has none.
    """

    names: tuple[str, ...]
    broken: tuple[tuple[str, str], ...]


@dataclass(frozen=True, slots=True)
class Counts:
    """How many vectors a part has, and how many items without one."""

    vectors: int
    broken: int


class Parts:
    """The parts beside an output."""

    def __init__(self, output: Path, ask: dict[str, Any]) -> None:
        """Find what an interrupted run of this ask left; what another one left is removed.

        Raises:
            BundleError: the place cannot be written.
        """
        self.folder = output.with_name(f"{output.name}.parts")
        try:
            same = json.loads((self.folder / _ASK).read_text("utf-8")) == json.loads(json.dumps(ask))
        except (OSError, ValueError):
            same = False
        if not same:
            shutil.rmtree(self.folder, ignore_errors=True)
            try:
                self.folder.mkdir(parents=True)
            except OSError as error:
                raise translate_os_error(error, self.folder) from error
            write_json(self.folder / _ASK, ask)
        self.finished: list[Counts] = []
        while self._file(len(self.finished)).is_file():
            self.finished.append(_counted(self.read(len(self.finished))))

    def add(self, part: Part, vectors: np.ndarray) -> None:
        """Write one more part: its vectors first, so that one without a JSON file does not count."""
        number = len(self.finished)
        write_file(self._file(number).with_suffix(".npy"), lambda file: np.save(file, vectors))
        write_json(self._file(number), asdict(part))
        self.finished.append(_counted(part))

    def read(self, number: int) -> Part:
        """What a part says of its items."""
        found = json.loads(self._file(number).read_text("utf-8"))
        return Part(tuple(found["names"]), tuple((name, reason) for name, reason in found["broken"]))

    def vectors(self, number: int) -> np.ndarray:
        """Of a part, float32 [N, D]."""
        found: np.ndarray = np.load(self._file(number).with_suffix(".npy"), allow_pickle=False)
        return found

    def __iter__(self) -> Iterator[Part]:
        """What each part says, one in memory at a time."""
        return map(self.read, range(len(self.finished)))

    def remove(self) -> None:
        """Nothing of it is needed any more."""
        shutil.rmtree(self.folder, ignore_errors=True)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


def _counted(part: Part) -> Counts:
    return Counts(len(part.names), len(part.broken))


def write_npy(output: Path, parts: Parts, width: int) -> None:
    """All vectors as one .npy file, a part in memory at a time; names beside it."""
    rows = sum(counts.vectors for counts in parts.finished)

    def write(file: BinaryIO) -> None:
        header = {"descr": "<f4", "fortran_order": False, "shape": (rows, width)}
        np.lib.format.write_array_header_1_0(file, header)
        for number in range(len(parts.finished)):
            file.write(np.ascontiguousarray(parts.vectors(number), "<f4").tobytes())

    write_lines(output.with_name(f"{output.name}.names.jsonl"), (name for part in parts for name in part.names))
    write_file(output, write)


def write_parquet(output: Path, parts: Parts, width: int) -> None:
    """Columns `name` and `embedding` (a list of fixed length), a row group for each part."""
    import pyarrow as pa
    import pyarrow.parquet as pq

    schema = pa.schema([("name", pa.string()), ("embedding", pa.list_(pa.float32(), width))])

    def write(file: BinaryIO) -> None:
        with pq.ParquetWriter(file, schema) as writer:
            for number, part in enumerate(parts):
                flat = pa.array(parts.vectors(number).reshape(-1), pa.float32())
                columns = [pa.array(part.names, pa.string()), pa.FixedSizeListArray.from_arrays(flat, width)]
                writer.write_table(pa.Table.from_arrays(columns, schema=schema))

    write_file(output, write)


def write_lines(path: Path, values: Iterator[Any]) -> None:
    """JSON lines: a name may hold a line break."""

    def write(file: BinaryIO) -> None:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")

    write_file(path, write)
