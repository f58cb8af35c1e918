"""Labelled image sets: the embedded CIFAR-10 test set, or the user's parquet in the Hugging Face layout."""

import io
import json
from collections.abc import Iterator
from dataclasses import dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image, UnidentifiedImageError

from d4c_onnx.errors import DatasetError

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
    """

    name: str
    classes: tuple[str, ...]
    labels: np.ndarray
    encoded: list[bytes]

    def __len__(self) -> int:
        return len(self.encoded)

    def batches(self, size: int) -> Iterator[list[Image.Image]]:
        """Decoded RGB images, `size` at a time.

        Raises:
            DatasetError: an image cannot be decoded.
        """
        for start in range(0, len(self.encoded), size):
            batch = []
            for number, blob in enumerate(self.encoded[start : start + size], start):
                try:
                    batch.append(Image.open(io.BytesIO(blob)).convert("RGB"))
                except (UnidentifiedImageError, OSError) as error:
                    raise DatasetError(f"{self.name}, row {number}: not an image ({error}).") from error
            yield batch


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
    try:
        table = pq.read_table(path)
    except (pa.ArrowException, OSError) as error:
        raise DatasetError(f"{path}: not a parquet file ({error}).") from error
    return _from_table(str(path), table, _class_names(path, table))


def _from_table(name: str, table: Any, classes: tuple[str, ...]) -> LabelledImages:
    columns = {"image", "label"} - set(table.column_names)
    if columns:
        raise DatasetError(f"{name}: has no column {sorted(columns)[0]!r}; expected image{{bytes}} and label.")
    if not len(table):
        raise DatasetError(f"{name}: holds no row.")
    try:
        encoded = [row["bytes"] for row in table["image"].to_pylist()]
        labels = np.array(table["label"].to_pylist(), np.int64)
    except (KeyError, TypeError, ValueError) as error:
        raise DatasetError(f"{name}: expected image{{bytes}} and an integer label in every row ({error}).") from error
    if labels.min() < 0 or labels.max() >= len(classes):
        raise DatasetError(f"{name}: labels run to {labels.max()}, but there are {len(classes)} class names.")
    return LabelledImages(name, classes, labels, encoded)


def _class_names(path: Path, table: Any) -> tuple[str, ...]:
    beside = path.with_name(path.name + ".classes.txt")
    if beside.is_file():
        return tuple(line.strip() for line in beside.read_text("utf-8").splitlines() if line.strip())
    try:
        info = json.loads((table.schema.metadata or {})[b"huggingface"])
        return tuple(info["info"]["features"]["label"]["names"])
    except (KeyError, ValueError, TypeError) as error:
        raise DatasetError(f"{path}: no class names. Write them, one a line, to {beside.name} beside it.") from error
