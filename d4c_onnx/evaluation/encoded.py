"""Encoded images where they lie, read one after the other: a set of photos may be larger than memory."""

import contextlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

import pyarrow as pa
import pyarrow.parquet as pq

from d4c_onnx.errors import DatasetError
from d4c_onnx.untrusted_json import check_readable, short

_ROWS = 16  # that are in memory together
_BUFFER = 2**20  # bytes of a column that are read ahead; without a buffer a whole row group's are


class Encoded(Protocol):
    """Encoded images (JPEG, PNG, ...), in order."""

    def __len__(self) -> int: ...

    def __iter__(self) -> Iterator[bytes]: ...

    def pick(self, indices: Sequence[int]) -> "Encoded":
        """Those of these indices, in this order."""


@dataclass(frozen=True, slots=True)
class InMemory:
    """Images that were read."""

    blobs: Sequence[bytes]

    def __len__(self) -> int:
        return len(self.blobs)

    def __iter__(self) -> Iterator[bytes]:
        return iter(self.blobs)

    def pick(self, indices: Sequence[int]) -> "InMemory":
        """Those of these indices, in this order."""
        return InMemory([self.blobs[index] for index in indices])


@dataclass(frozen=True, slots=True)
class Files:
    """A file each."""

    paths: Sequence[Path]

    def __len__(self) -> int:
        return len(self.paths)

    def __iter__(self) -> Iterator[bytes]:
        """Raises DatasetError: a file cannot be read."""
        for path in self.paths:
            check_readable(path, DatasetError)
            try:
                yield path.read_bytes()
            except OSError as error:
                raise DatasetError(f"{path}: cannot be read ({short(error)}).") from error

    def pick(self, indices: Sequence[int]) -> "Files":
        """Those of these indices, in this order."""
        return Files([self.paths[index] for index in indices])


@dataclass(frozen=True, slots=True)
class Rows:
    """The column `image{bytes}` of a parquet file.

    Attributes:
        name: for messages.
        source: a file's path, or a buffer.
        count: rows.
    """

    name: str
    source: Any
    count: int

    def __len__(self) -> int:
        return self.count

    def __iter__(self) -> Iterator[bytes]:
        """Raises DatasetError: the file is damaged, or a row holds no image."""
        with reading(self.name), pq.ParquetFile(self.source, buffer_size=_BUFFER) as file:
            number = 0
            for batch in file.iter_batches(_ROWS, columns=["image"]):
                for row in batch.column("image"):
                    yield _bytes_of(row.as_py(), f"{self.name}, row {number}")
                    number += 1

    def pick(self, indices: Sequence[int]) -> InMemory:
        """Those of these indices, in this order: a file is read through once."""
        wanted = set(indices)
        found = {number: blob for number, blob in enumerate(self) if number in wanted}
        return InMemory([found[index] for index in indices])


def open_rows(name: str, source: Any) -> Rows:
    """The images of a parquet file, of which only the form is looked at.

    Raises:
        DatasetError: the file has another layout, or no row.
    """
    if isinstance(source, Path):
        check_readable(source, DatasetError)
    with reading(name), pq.ParquetFile(source) as file:
        schema, count = file.schema_arrow, file.metadata.num_rows
    if "image" not in schema.names:
        raise DatasetError(f"{name}: has no column 'image'; expected image{{bytes}}.")
    if not count:
        raise DatasetError(f"{name}: holds no row.")
    kind = schema.field("image").type
    if not (pa.types.is_struct(kind) and kind.get_field_index("bytes") >= 0):
        raise DatasetError(f"{name}: expected image{{bytes}} in every row, found {short(kind)}.")
    inner = kind.field("bytes").type
    if not (pa.types.is_binary(inner) or pa.types.is_large_binary(inner) or pa.types.is_fixed_size_binary(inner)):
        raise DatasetError(f"{name}: expected image{{bytes}} in every row, found {short(inner)}.")
    return Rows(name, source, count)


def _bytes_of(value: Any, place: str) -> bytes:
    found = value.get("bytes") if isinstance(value, dict) else value
    if not isinstance(found, bytes):
        raise DatasetError(f"{place}: expected image{{bytes}}, found {type(found).__name__}.")
    return found


@contextlib.contextmanager
def reading(name: str) -> Iterator[None]:
    """What pyarrow raises of a damaged file, as one message."""
    try:
        yield
    except (pa.ArrowException, OSError, UnicodeDecodeError) as error:
        raise DatasetError(f"{name}: not a parquet file, or a damaged one ({short(error)}).") from error
