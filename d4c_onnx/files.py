"""Writing folders and files so that an interrupted or failed run leaves nothing half-written.

Everything is written to a temporary name beside its target, fsynced, and renamed into place.
"""

import contextlib
import errno
import hashlib
import json
import os
import shutil
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from d4c_onnx.errors import BundleError

_STAGE = ".stage-"


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse before any work starts when `target` is in the way.

    Raises:
        BundleError: the target exists and `overwrite` is not set, is not a folder, or could not be made there.
    """
    above = next(path for path in (target.absolute(), *target.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        why = "exists and" if above == target.absolute() else f"cannot be made: {above}"
        raise BundleError(f"{target}: {why} is not a folder. Choose another --output.")
    if not os.access(above, os.W_OK):
        raise BundleError(f"{target}: cannot be written, {above} is read-only here. Choose another --output.")
    if target.exists() and any(target.iterdir()) and not overwrite:
        raise BundleError(f"{target}: already exists. Add --overwrite to replace it, or choose another --output.")


@contextlib.contextmanager
def staged_folder(target: Path) -> Iterator[Path]:
    """Yield an empty folder beside `target` that replaces `target` when the block ends without an error.

    Args:
        target: the final folder; its parents are made. An existing one is replaced as a whole.

    Raises:
        BundleError: the disk is full, or the place cannot be written.
    """
    stage = target.parent / f"{_STAGE}{target.name}-{os.getpid()}"
    old = target.parent / f".old-{target.name}"
    try:
        target.parent.mkdir(parents=True, exist_ok=True)
        for stale in target.parent.glob(f"{_STAGE}{target.name}-*"):
            if not _alive(stale.name.rpartition("-")[2]):
                shutil.rmtree(stale, ignore_errors=True)
        if old.exists() and not target.exists():  # an earlier run died between the two renames below
            old.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        stage.mkdir()
        yield stage
        for file in sorted(stage.rglob("*")):
            if file.is_file():
                _fsync(file)
        if target.exists():
            target.rename(old)
        stage.rename(target)
        shutil.rmtree(old, ignore_errors=True)
        _fsync(target.parent)
    except OSError as error:
        raise translate_os_error(error, target) from error
    finally:
        shutil.rmtree(stage, ignore_errors=True)


def write_text(path: Path, text: str) -> None:
    """Write one text file atomically."""
    write_file(path, lambda file: file.write(text.encode()))


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write one file atomically: `write` is given a temporary one, which takes the path when it is complete.

    Raises:
        BundleError: the disk is full or the place cannot be written.
    """
    temporary = path.with_name(f"{_STAGE}{path.name}-{os.getpid()}")
    try:
        with temporary.open("wb") as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _fsync(path.parent)
    except OSError as error:
        raise translate_os_error(error, path) from error
    finally:
        temporary.unlink(missing_ok=True)


def write_json(path: Path, value: Any) -> None:
    """Write one JSON file atomically, keys in the given order, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def translate_os_error(error: OSError, target: Path) -> BundleError:
    """An operating-system error as one that says what to do."""
    # numpy reports a short write in words, without an error number
    short_write = error.errno is None and "requested and" in str(error)
    if short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG):
        return BundleError(
            f"{target}: no space left to write ({error.strerror or error}). Free some and run the same command again."
        )
    if error.errno in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST):
        return BundleError(f"{target}: cannot be written ({error.strerror}). Choose another --output.")
    return BundleError(f"{target}: {error.strerror or error}.")


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def _alive(pid: str) -> bool:
    try:
        os.kill(int(pid), 0)
    except (ValueError, ProcessLookupError):
        return False
    except PermissionError:
        return True
    return True
