"""The files of a calibration set, as they are read: a set may come from anywhere, and nothing is taken on trust."""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field
from pathlib import Path
from typing import TypeVar

import numpy as np

from d4c_onnx.calibration.key import CalibrationKey
from d4c_onnx.errors import CalibrationError
from d4c_onnx.manifest import LARGEST_SIDE, LONGEST_CONTEXT
from d4c_onnx.untrusted_json import (
    Node,
    check_readable,
    integer,
    mapping,
    measured_number,
    nullable,
    read_json,
    recorded,
    sequence,
    sha256_text,
    short,
    text,
)

T = TypeVar("T")

MEND = "Delete the folder if it was a set, and make it (again) with d4c-onnx synthesize."
_LONGEST = 10_000  # characters of a prompt
_CHUNK = 16  # images that are looked at together


@dataclass(frozen=True, slots=True)
class SetManifest:
    """`manifest.json`.

    Attributes:
        model: the name of what the set was made for.
        key: everything that was asked for.
        compute: device and precision that images were made with; empty for controls.
        versions: of the libraries.
        files: SHA-256 by name; empty until they are written.
    """

    model: str
    key: CalibrationKey
    compute: Mapping[str, str]
    versions: Mapping[str, str]
    files: Mapping[str, str] = field(default_factory=dict)

    def record(self) -> dict[str, object]:
        """As JSON holds it."""
        return {**asdict(self), "key": self.key.record()}


@dataclass(frozen=True, slots=True)
class SetTexts:
    """`prompts.json`; see `CalibrationSet`."""

    texts: tuple[str, ...]
    input_ids: tuple[tuple[int, ...], ...]
    held_out_texts: tuple[str, ...]
    labels: tuple[str, ...]


def read_set_json(file: Path, read: Callable[[Node], T]) -> T:
    """What a reader makes of one of a set's JSON files.

    Raises:
        CalibrationError: the file is missing, damaged, or not what the reader reads.
    """
    check_regular(file)
    return read(read_json(file, CalibrationError, MEND))


def check_regular(file: Path) -> None:
    """Refuse what is no file: a pipe would be waited for, and a device may have no end."""
    check_readable(file, CalibrationError)
    if not file.is_file():
        raise CalibrationError(f"{file.parent}: not a complete calibration set (no file {file.name}). {MEND}")


def set_manifest(top: Node) -> SetManifest:
    """`manifest.json`."""
    return SetManifest(
        model=top.take("model", text, ""),
        key=top.take("key", _key),
        compute=top.take("compute", mapping(text), {}),
        versions=top.take("versions", mapping(text), {}),
        files=top.take("files", mapping(sha256_text, _file_name)),
    )


def set_texts(top: Node) -> SetTexts:
    """`prompts.json`."""
    ids = sequence(integer(0, 2**31 - 1))

    def row(node: Node) -> tuple[int, ...]:
        found = ids(node)
        if not 1 <= len(found) <= LONGEST_CONTEXT:
            raise node.wrong(f"1 to {LONGEST_CONTEXT} ids")
        return found

    texts = top.take("texts", sequence(_prompt))
    return SetTexts(
        texts,
        top.take("input_ids", sequence(row, len(texts))),
        top.take("held_out_texts", sequence(_prompt)),
        top.take("image_labels", sequence(_prompt)),
    )


def set_losses(top: Node) -> tuple[dict[str, list[float]], ...]:
    """`losses.json`."""
    units = sequence(mapping(sequence(measured_number)))(top)
    return tuple({name: list(values) for name, values in unit.items()} for unit in units)


def read_images(file: Path) -> np.ndarray:
    """float32 [N, 3, H, W], which stays on disk until it is used; every value is finite.

    Raises:
        CalibrationError: the file is no such array.
    """
    check_regular(file)
    try:
        found = np.load(file, mmap_mode="r", allow_pickle=False)
    except Exception as error:  # numpy parses the header with ast, and sizes may be beyond any memory
        raise CalibrationError(f"{file}: cannot be read ({short(error)}). {MEND}") from error
    if not isinstance(found, np.ndarray):
        raise CalibrationError(f"{file}: holds several arrays, not one. {MEND}")
    sides = found.shape[1:]
    if found.ndim != 4 or sides[0] != 3 or found.dtype != np.float32 or not all(1 <= n <= LARGEST_SIDE for n in sides):
        raise CalibrationError(f"{file}: is {found.dtype} {found.shape}, not float32 [N, 3, H, W]. {MEND}")
    for start in range(0, len(found), _CHUNK):
        if not np.isfinite(found[start : start + _CHUNK]).all():
            raise CalibrationError(f"{file}: holds NaN or infinity. {MEND}")
    return found


def _key(node: Node) -> CalibrationKey:
    return CalibrationKey(
        generator=node.take("generator", integer(0, 2**31 - 1), 0),
        weights_sha256=node.take("weights_sha256", sha256_text),
        seed=node.take("seed", integer(0, 2**31 - 1)),
        synthesis=node.take("synthesis", _synthesis),
        method=node.take("method", nullable(mapping(recorded)), None),
        text=node.take("text", mapping(recorded)),
        nouns=node.take("nouns", sequence(_prompt)),
        texts_sha256=node.take("texts_sha256", nullable(sha256_text), None),
        id=node.take("id", text),
    )


def _synthesis(node: Node) -> dict[str, object]:
    told = {"method": node.take("method", text), "template": node.take("template", _template)}
    return mapping(recorded)(node) | told | {"source": node.take("source", nullable(text), None)}


def _template(node: Node) -> str:
    found = _prompt(node)
    if found.count("{}") != 1 or set("{}") & set(found.replace("{}", "")):
        raise node.wrong("a text with one {}")
    return found


def _prompt(node: Node) -> str:
    """Text of any letters, as tokenizers give them; no half of a pair."""
    value = node.value
    if not isinstance(value, str) or len(value) > _LONGEST or any("\ud800" <= letter <= "\udfff" for letter in value):
        raise node.wrong(f"text of at most {_LONGEST} letters")
    return value


def _file_name(node: Node) -> str:
    name = text(node)
    if name in ("", ".", "..") or not {"/", "\\", ":"}.isdisjoint(name):
        raise node.wrong("a file's name")
    return name


def check_together(images: np.ndarray, held_out: np.ndarray, labels: tuple[str, ...], place: Path) -> None:
    """Compare the parts of a set with each other.

    Raises:
        CalibrationError: the two kinds of images have different sizes, or labels are of other images.
    """
    if len(held_out) and images.shape[1:] != held_out.shape[1:]:
        sizes = " and ".join("x".join(map(str, array.shape[2:])) for array in (images, held_out))
        raise CalibrationError(f"{place}: its images and those that it holds out are {sizes}. {MEND}")
    if len(labels) not in (0, len(images) + len(held_out)):
        raise CalibrationError(f"{place}: has {len(labels)} labels for {len(images) + len(held_out)} images. {MEND}")
