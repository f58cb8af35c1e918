"""Labelled image sets: the embedded CIFAR-10 test set, or the user's parquet in the Hugging Face layout."""

import hashlib
import json
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

from d4c_onnx.errors import DatasetError
from d4c_onnx.files import sha256
from d4c_onnx.runtime.images import IMAGE_SUFFIXES, read_image

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EMBEDDED = ("cifar10",)


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """A zero-shot classification set.

    Attributes:
        name: for reports.
        classes: class names, in label order.
        labels: int64 [N].
        encoded: N encoded images (JPEG, PNG, ...).
        places: where each image stands in its source (a row, a file), for messages.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    encoded: list[bytes]
    places: list[str]

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """Decoded images in the modes of their files, `size` at a time: `preprocess_image` makes them RGB.

        Raises:
            DatasetError: an image cannot be decoded.
        """
        for start in range(0, len(self.encoded), size):
            batch: list[Image.Image] = []
            part = slice(start, start + size)
            for place, blob in zip(self.places[part], self.encoded[part], strict=True):
                try:
                    batch.append(read_image(blob))
                except DatasetError as error:
                    raise DatasetError(f"{self.name}, {place}: {error}") from error
            yield batch

    def select(self, indices: Iterable[int]) -> "LabelledImages":
        """The images of these indices, in this order."""
        chosen = [int(index) for index in indices]
        encoded, places = [self.encoded[index] for index in chosen], [self.places[index] for index in chosen]
        return LabelledImages(self.name, self.classes, self.labels[chosen], encoded, places)


def open_dataset(name: str) -> LabelledImages:
    """An embedded set by name, or a .parquet file with `image{bytes}` and an integer `label` column.

    Class names of a file come from its Hugging Face metadata (`ClassLabel`), or from `<file>.classes.txt`.

    Raises:
        DatasetError: no such set, or the file has another layout.
    """
    if name in EMBEDDED:
        blob = (resources.files("d4c_onnx.evaluation.data") / f"{name}-test.parquet").read_bytes()
        return _from_table(name, pq.read_table(pa.BufferReader(blob)), CIFAR10)
    path = Path(name)
    if path.suffix != ".parquet" or not path.is_file():
        raise DatasetError(f"--dataset {name}: neither an embedded set ({', '.join(EMBEDDED)}) nor a .parquet file.")
    table = _read_table(path)
    return _from_table(str(path), table, _class_names(path, table))


def open_images(path: Path) -> LabelledImages:
    """Images without labels: every image below a folder, in name order, or a .parquet file with `image{bytes}`.

    Returns:
        A set whose labels are all 0.

    Raises:
        DatasetError: nothing there, or the file has another layout.
    """
    if path.is_dir():
        files = _image_files(path)
        if not files:
            raise DatasetError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        encoded = [file.read_bytes() for file in files]
        places = [file.relative_to(path).as_posix() for file in files]
    else:
        table = _read_table(path)
        encoded = _encoded(path.name, table)
        places = _rows(encoded)
    return LabelledImages(path.name, ("",), np.zeros(len(encoded), np.int64), encoded, places)


def content_sha256(path: Path) -> str:
    """One digest of a file, or of all images below a folder with their relative names.

    Raises:
        DatasetError: nothing there.
    """
    if path.is_file():
        return sha256(path)
    if not path.is_dir():
        raise DatasetError(f"{path}: no such folder or file.")
    digest = hashlib.sha256()
    for file in _image_files(path):
        digest.update(f"{file.relative_to(path).as_posix()} {sha256(file)}\n".encode())
    return digest.hexdigest()


def _image_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]


def _read_table(path: Path) -> Any:
    try:
        return pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: not a parquet file ({error}).") from error


def _encoded(name: str, table: Any) -> list[bytes]:
    if "image" not in table.column_names:
        raise DatasetError(f"{name}: has no column 'image'; expected image{{bytes}}.")
    if not len(table):
        raise DatasetError(f"{name}: holds no row.")
    try:
        encoded = [row["bytes"] for row in table["image"].to_pylist()]
    except (KeyError, TypeError) as error:
        raise DatasetError(f"{name}: expected image{{bytes}} in every row ({error}).") from error
    odd = next((number for number, blob in enumerate(encoded) if not isinstance(blob, bytes)), None)
    if odd is not None:
        raise DatasetError(f"{name}, row {odd}: expected image{{bytes}}, found {type(encoded[odd]).__name__}.")
    return encoded


def _from_table(name: str, table: Any, classes: tuple[str, ...]) -> LabelledImages:
    columns = {"image", "label"} - set(table.column_names)
    if columns:
        raise DatasetError(f"{name}: has no column {sorted(columns)[0]!r}; expected image{{bytes}} and label.")
    encoded = _encoded(name, table)
    if not pa.types.is_integer(table["label"].type):
        raise DatasetError(f"{name}: labels are {table['label'].type}, not integers.")
    try:
        labels = np.array(table["label"].to_pylist(), np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{name}: expected image{{bytes}} and an integer label in every row ({error}).") from error
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DatasetError(f"{name}: labels run to {labels.max()}, but there are {len(classes)} class names.")
    return LabelledImages(name, classes, labels, encoded, _rows(encoded))


def _rows(encoded: list[bytes]) -> list[str]:
    return [f"row {number}" for number in range(len(encoded))]


def _class_names(path: Path, table: Any) -> tuple[str, ...]:
    beside = path.with_name(path.name + ".classes.txt")
    if beside.is_file():
        try:
            lines = beside.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{beside}: cannot be read as UTF-8 text ({error}).") from error
        return tuple(line.strip() for line in lines if line.strip())
    try:
        info = json.loads((table.schema.metadata or {})[b"huggingface"])
        return tuple(info["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{path}: no class names. Write them, one a line, to {beside.name} beside it.") from error
