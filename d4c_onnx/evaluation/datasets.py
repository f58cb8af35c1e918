"""Labelled image sets: the embedded CIFAR-10 test set, or the user's parquet in the Hugging Face layout."""

import hashlib
import json
import os
from collections.abc import Iterable, Iterator, Sequence
from dataclasses import dataclass
from importlib import resources
from itertools import islice
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
from PIL import Image

from d4c_onnx.errors import DatasetError
from d4c_onnx.evaluation.encoded import Encoded, Files, Rows, open_rows, reading
from d4c_onnx.files import sha256
from d4c_onnx.runtime.images import IMAGE_SUFFIXES, read_image
from d4c_onnx.untrusted_json import check_readable, short

CIFAR10 = ("airplane", "automobile", "bird", "cat", "deer", "dog", "frog", "horse", "ship", "truck")
EMBEDDED = ("cifar10",)
_LONGEST = 1000  # characters of a class name


@dataclass(frozen=True, slots=True)
class LabelledImages:
    """A zero-shot classification set.

    Attributes:
        name: for reports.
        classes: class names, in label order.
        labels: int64 [N].
        encoded: N encoded images, which are read when they are looked at.
        places: where each image stands in its source (a row, a file), for messages.
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    encoded: Encoded
    places: Sequence[str]

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, size: int) -> Iterator[Iterator[Image.Image]]:
        """Images in the modes of their files, `size` at a time: `preprocess_image` makes them RGB.

        Each is decoded when it is its turn, so that whoever looks at one after the other has one in memory: a photo
        of 24 megapixels takes 72 MB. A batch ends with its images, before the next one is asked for.

        Raises:
            DatasetError: an image cannot be decoded; when it is its turn.
        """
        images = self._images()
        for start in range(0, len(self.encoded), size):
            yield islice(images, min(size, len(self.encoded) - start))

    def _images(self) -> Iterator[Image.Image]:
        for place, blob in zip(self.places, self.encoded, strict=True):
            try:
                image = read_image(blob)
            except DatasetError as error:
                raise DatasetError(f"{self.name}, {place}: {error}") from error
            yield image

    def select(self, indices: Iterable[int]) -> "LabelledImages":
        """The images of these indices, in this order."""
        chosen = [int(index) for index in indices]
        places = [self.places[index] for index in chosen]
        return LabelledImages(self.name, self.classes, self.labels[chosen], self.encoded.pick(chosen), places)


def open_dataset(name: str) -> LabelledImages:
    """An embedded set by name, or a .parquet file with `image{bytes}` and an integer `label` column.

    Class names of a file come from its Hugging Face metadata (`ClassLabel`), or from `<file>.classes.txt`.

    Raises:
        DatasetError: no such set, or the file has another layout.
    """
    if name in EMBEDDED:
        blob = (resources.files("d4c_onnx.evaluation.data") / f"{name}-test.parquet").read_bytes()
        return _labelled(name, open_rows(name, pa.py_buffer(blob)), CIFAR10)
    path = Path(name)
    if path.suffix != ".parquet" or not path.is_file():
        raise DatasetError(f"--dataset {name}: neither an embedded set ({', '.join(EMBEDDED)}) nor a .parquet file.")
    return _labelled(str(path), open_rows(str(path), path), _class_names(path))


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
        encoded: Encoded = Files(files)
        places: Sequence[str] = [file.relative_to(path).as_posix() for file in files]
    else:
        encoded = open_rows(path.name, path)
        places = _rows(len(encoded))
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
        digest.update(os.fsencode(f"{file.relative_to(path).as_posix()} {sha256(file)}\n"))
    return digest.hexdigest()


def _image_files(folder: Path) -> list[Path]:
    return [file for file in sorted(folder.rglob("*")) if file.suffix.lower() in IMAGE_SUFFIXES and file.is_file()]


def _labelled(name: str, encoded: Rows, classes: tuple[str, ...]) -> LabelledImages:
    with reading(name), pq.ParquetFile(encoded.source) as file:
        if "label" not in file.schema_arrow.names:
            raise DatasetError(f"{name}: has no column 'label'; expected image{{bytes}} and label.")
        kind = file.schema_arrow.field("label").type
        if not pa.types.is_integer(kind):
            raise DatasetError(f"{name}: labels are {short(kind)}, not integers.")
        found = file.read(["label"])["label"]
    if found.null_count:
        raise DatasetError(f"{name}: expected an integer label in every row; {found.null_count} have none.")
    low, high = (int(value.as_py()) for value in pc.min_max(found).values())
    if low < 0 or high >= len(classes):
        raise DatasetError(f"{name}: labels run from {low} to {high}, but there are {len(classes)} class names.")
    return LabelledImages(name, classes, found.to_numpy().astype(np.int64), encoded, _rows(len(encoded)))


def _rows(count: int) -> list[str]:
    return [f"row {number}" for number in range(count)]


def _class_names(path: Path) -> tuple[str, ...]:
    beside = path.with_name(path.name + ".classes.txt")
    if beside.is_file():
        check_readable(beside, DatasetError)
        try:
            lines = beside.read_text("utf-8-sig").splitlines()
        except (OSError, UnicodeDecodeError) as error:
            raise DatasetError(f"{beside}: cannot be read as UTF-8 text ({error}).") from error
        return _not_too_long(beside, [line.strip() for line in lines if line.strip()])
    with reading(str(path)):
        stored = (pq.read_schema(path).metadata or {}).get(b"huggingface", b"{}")
    try:
        names = json.loads(stored)["info"]["features"]["label"]["names"]
        if isinstance(names, list) and names and all(isinstance(name, str) for name in names):
            return _not_too_long(path, names)
    except (KeyError, ValueError, TypeError, RecursionError):
        pass
    raise DatasetError(f"{path}: no class names. Write them, one a line, to {beside.name} beside it.")


def _not_too_long(file: Path, names: list[str]) -> tuple[str, ...]:
    """Class names, which a prompt each is made of: a megabyte of one takes a tokenizer minutes."""
    longest = max(map(len, names), default=0)
    if longest > _LONGEST:
        raise DatasetError(f"{file}: a class name has {longest:,} characters. Write them one a line.")
    return tuple(names)
