"""What is embedded: images below a folder or in a tar, or the lines of a text file, one after another."""

import os
import tarfile
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Literal

from d4c_onnx.errors import DatasetError
from d4c_onnx.runtime.images import IMAGE_SUFFIXES
from d4c_onnx.untrusted_json import check_readable, short

_TARS = (".tar", ".tar.gz", ".tgz")
_LARGEST = 2**28  # bytes of one encoded image
_LONGEST_LINE = 2**20  # bytes


@dataclass(frozen=True, slots=True)
class Item:
    """One image or text.

    Attributes:
        name: where it stands: a path below the folder, a member of the tar, the text itself.
        content: a path, encoded bytes or a text; None: it cannot be read.
        fault: why not.
        done: how much of `Source.total` lies behind it.
    """

    name: str
    content: Path | bytes | str | None
    fault: str
    done: int


@dataclass(frozen=True, slots=True)
class Source:
    """Where items come from.

    Attributes:
        path: as the user named it.
        form: what it is.
        total: files of a folder; bytes of a file.
    """

    path: Path
    form: Literal["folder", "tar", "texts"]
    total: int

    def __iter__(self) -> Iterator[Item]:
        """The items, in an order that stays the same while the source does.

        Raises:
            DatasetError: a tar is damaged.
        """
        return {"folder": _folder, "tar": _tar, "texts": _texts}[self.form](self.path)


def open_source(path: Path) -> Source:
    """A folder of images, a tar of images (.tar, .tar.gz), or a text file with one text a line.

    Raises:
        DatasetError: nothing is there, or a folder holds no image.
    """
    check_readable(path, DatasetError)
    if path.is_dir():
        total = sum(1 for _ in _files(path))
        if not total:
            raise DatasetError(f"{path}: holds no image ({', '.join(IMAGE_SUFFIXES)}).")
        return Source(path, "folder", total)
    if not path.is_file():
        raise DatasetError(f"{path}: no such folder or file.")
    form: Literal["tar", "texts"] = "tar" if path.name.lower().endswith(_TARS) else "texts"
    return Source(path, form, path.stat().st_size)


def _files(folder: Path) -> Iterator[Path]:
    """Every image below a folder, folder by folder, in name order."""
    for place, folders, names in os.walk(folder):
        folders.sort()
        for name in sorted(names):
            if name.lower().endswith(IMAGE_SUFFIXES):
                yield Path(place, name)


def _folder(path: Path) -> Iterator[Item]:
    for number, file in enumerate(_files(path), 1):
        yield Item(_printable(file.relative_to(path).as_posix()), file, "", number)


def _tar(path: Path) -> Iterator[Item]:
    try:
        # as a stream: nothing of what was read is kept
        with path.open("rb") as raw, tarfile.open(fileobj=raw, mode="r|*") as tar:
            for member in tar:
                tar.members.clear()  # type: ignore[attr-defined]  # it would remember each
                if not member.isfile() or not member.name.lower().endswith(IMAGE_SUFFIXES):
                    continue
                name = _printable(member.name)
                if member.size > _LARGEST:
                    yield Item(
                        name, None, f"has {member.size:,} bytes, more than the {_LARGEST:,} that are read", raw.tell()
                    )
                    continue
                content = tar.extractfile(member)
                yield Item(name, b"" if content is None else content.read(), "", raw.tell())
    except (tarfile.TarError, OSError, EOFError) as error:
        raise DatasetError(f"{path}: is no tar, or a damaged one ({short(error)}).") from error


def _texts(path: Path) -> Iterator[Item]:
    with path.open("rb") as file:
        number = 0
        while line := file.readline(_LONGEST_LINE):
            number += 1
            if len(line) == _LONGEST_LINE and not line.endswith(b"\n"):
                while (rest := file.readline(_LONGEST_LINE)) and not rest.endswith(b"\n"):
                    pass
                yield Item(f"line {number}", None, f"is longer than {_LONGEST_LINE:,} bytes", file.tell())
                continue
            try:
                text = line.decode("utf-8-sig" if number == 1 else "utf-8").rstrip("\r\n")
            except UnicodeDecodeError as error:
                yield Item(f"line {number}", None, f"is no UTF-8 ({short(error)})", file.tell())
                continue
            yield Item(text, text, "", file.tell())


def _printable(name: str) -> str:
    """A file's name as JSON and parquet can hold it."""
    return name.encode("utf-8", "backslashreplace").decode("utf-8")
