"""Finished work of an embedding, in parts: each is written whole or not at all, and together they become the result.

<output>.parts/
  ask.json          what was asked: another ask does not go on with these parts
  00000.npy         float32 [N, D]
  00000.json        names of the vectors, and what was broken
"""

import contextlib
import json
import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import BinaryIO

import numpy as np

from d4c_onnx.errors import BundleError
from d4c_onnx.files import translate_os_error, write_file, write_json
from d4c_onnx.manifest import Preprocess
from d4c_onnx.ownership import staged_for
from d4c_onnx.untrusted_json import Node, holds, quoted, read_json, sequence

_ASK = "ask.json"
_OWN = re.compile(rf"{re.escape(_ASK)}|\d{{5,}}\.(?:json|npy)")


def parts_of(output: Path) -> Path:
    """The folder of an output's parts."""
    return output.with_name(f"{output.name}.parts")


def names_of(output: Path) -> Path:
    """The file of names beside a .npy file."""
    return output.with_name(f"{output.name}.names.jsonl")


def clear_finished(output: Path) -> None:
    """Remove the parts of a run that was killed behind its last rename: the output is younger than all of them.

    Args:
        output: whose parts are held by this run (`files.claimed`).
    """
    folder = parts_of(output)
    with contextlib.suppress(OSError):
        made = output.stat().st_mtime_ns
        if all(entry.stat().st_mtime_ns <= made for entry in folder.iterdir() if _is_own(entry)):
            _remove(folder)


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


@dataclass(frozen=True, slots=True)
class Ask:
    """What another run must ask to go on with the parts of this one.

    Attributes:
        files: SHA-256 of the bundle's files, by name.
        preprocess: from an image to pixels.
        source, form, total, changed: the source's path, what it is, its length and when it was written; a folder's
            files are counted.
        part: items of a part.
    """

    files: Mapping[str, str]
    preprocess: Preprocess
    source: str
    form: str
    total: int
    changed: int
    part: int


class Parts:
    """The parts beside an output."""

    def __init__(self, output: Path, ask: Ask) -> None:
        """Find what an interrupted run of this ask left; what another one left is removed.

        Args:
            output: whose parts are held by this run (`files.claimed`).

        Raises:
            BundleError: the place cannot be written, or holds what no run left there.
        """
        self.folder = parts_of(output)
        try:
            self.folder.mkdir(parents=True, exist_ok=True)
            odd = next((entry.name for entry in self.folder.iterdir() if not _is_own(entry)), None)
            if odd is not None:
                raise BundleError(
                    f"{self.folder}: holds {quoted(odd)}, which d4c-onnx did not write there, and would be removed. "
                    "Move that away, or choose another --output."
                )
            if not holds(self.folder / _ASK, asdict(ask)):
                _clear(self.folder)
                write_json(self.folder / _ASK, asdict(ask))
        except OSError as error:
            raise translate_os_error(error, self.folder) from error
        self.finished: list[Counts] = []
        while (counts := self._found(len(self.finished))) is not None:
            self.finished.append(counts)

    def _found(self, number: int) -> Counts | None:
        """Of a part that another run left; None: it is not there, or not whole, and is embedded again."""
        try:
            top = read_json(self._file(number))
            names = top.take("names", sequence(_name))
            broken = top.take("broken", sequence(sequence(_name, 2)))
            whole = _is_whole(self._file(number).with_suffix(".npy"), len(names))
        except (BundleError, OSError, ValueError):
            return None
        return Counts(len(names), len(broken)) if whole else None

    def add(self, part: Part, vectors: np.ndarray) -> None:
        """Write one more part: its vectors first, so that one without a JSON file does not count."""
        number = len(self.finished)
        write_file(self._file(number).with_suffix(".npy"), lambda file: np.save(file, vectors))
        write_json(self._file(number), asdict(part))
        self.finished.append(_counted(part))

    def read(self, number: int) -> Part:
        """What a part says of its items; it was written by this run, or looked at when it was found."""
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
        with contextlib.suppress(OSError):
            _remove(self.folder)

    def _file(self, number: int) -> Path:
        return self.folder / f"{number:05d}.json"


def _clear(folder: Path) -> None:
    for entry in folder.iterdir():
        if _is_own(entry):
            entry.unlink()


def _remove(folder: Path) -> None:
    _clear(folder)
    folder.rmdir()


def _is_own(entry: Path) -> bool:
    """Whether a run wrote it, whole or half."""
    named = _OWN.fullmatch(entry.name) is not None or staged_for(entry.name) is not None
    return named and entry.is_file() and not entry.is_symlink()


def _is_whole(file: Path, rows: int) -> bool:
    """Whether a .npy file is float32 [rows, D] to its end; ValueError: it is none."""
    with file.open("rb") as opened:
        np.lib.format.read_magic(opened)
        shape, _, dtype = np.lib.format.read_array_header_1_0(opened)
        size = opened.tell() + dtype.itemsize * math.prod(shape)
    return dtype == np.float32 and len(shape) == 2 and shape[0] == rows and file.stat().st_size == size


def _name(node: Node) -> str:
    """A text of any length: lines of a file are names, too."""
    if not isinstance(node.value, str):
        raise node.wrong("text")
    return node.value


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

    write_lines(names_of(output), (name for part in parts for name in part.names))
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


def write_lines(path: Path, values: Iterator[object]) -> None:
    """JSON lines: a name may hold a line break."""

    def write(file: BinaryIO) -> None:
        for value in values:
            file.write(json.dumps(value, ensure_ascii=False).encode() + b"\n")

    write_file(path, write)
