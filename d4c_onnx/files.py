"""Writing folders and files so that an interrupted or failed run leaves nothing half-written.

Everything is written to a temporary name beside its target, fsynced, and renamed into place.
"""

import contextlib
import errno
import hashlib
import io
import json
import os
import secrets
import shutil
import tempfile
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any, BinaryIO

from d4c_onnx.errors import BundleError
from d4c_onnx.locks import locked
from d4c_onnx.ownership import OLD, STAGE, WORK, is_made, staged_for, strangers

_CANNOT_WRITE = (
    *(errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOENT, errno.ENOTDIR, errno.EEXIST, errno.ENOTEMPTY),
    *(errno.ENAMETOOLONG, errno.ELOOP),
)

_MORE_ROOM = "Set TMPDIR to a folder with more room, and run the same command again: what is finished is kept."


def sha256(path: Path) -> str:
    """Hex SHA-256 of a file."""
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()


def refuse_existing(target: Path, overwrite: bool) -> None:
    """Refuse before any work starts when `target` is in the way.

    Raises:
        BundleError: the target exists and `overwrite` is not set, holds what d4c-onnx did not write, is not a folder,
            or could not be made there.
    """
    _check_place(target)
    if not target.exists() or not any(target.iterdir()):
        return
    if not overwrite:
        raise BundleError(f"{target}: already exists. Add --overwrite to replace it, or choose another --output.")
    found = strangers(target)
    if found:
        more = f" and {len(found) - 1} more" if len(found) > 1 else ""
        raise BundleError(
            f"{target}: holds {found[0]!r:.200}{more}, which d4c-onnx did not write there, so it is not overwritten. "
            "Move that away, or choose another --output."
        )


def _check_place(target: Path) -> None:
    above = next(path for path in (target.absolute(), *target.absolute().parents) if os.path.lexists(path))
    if not above.is_dir():
        why = "exists and" if above == target.absolute() else f"cannot be made: {above}"
        raise BundleError(f"{target}: {why} is not a folder. Choose another --output.")
    if not os.access(above, os.W_OK):
        raise BundleError(f"{target}: cannot be written, {above} is read-only here. Choose another --output.")


@contextlib.contextmanager
def claimed(folder: Path, *beside: str) -> Iterator[None]:
    """Hold a folder against other runs, and clear what killed ones left of it.

    Args:
        beside: names of further files in the folder above, which are written while the folder is held.

    Raises:
        BundleError: another run is writing there, or nobody can.
    """
    _check_place(folder)
    with contextlib.ExitStack() as held:
        try:
            if held.enter_context(locked(folder)):
                _clear_leftovers(folder, {folder.name, *beside})
        except OSError as error:
            raise translate_os_error(error, folder) from error
        yield


def _clear_leftovers(folder: Path, names: set[str]) -> None:
    """What was half-written goes; what was finished and moved aside for what never came comes back."""
    for entry in list(folder.parent.iterdir()):
        if not names.isdisjoint((staged_for(entry.name), entry.name.removeprefix(OLD))):
            _clear(entry)
    if folder.is_dir():
        inside = [entry for entry in folder.iterdir() if entry.is_dir() and not entry.is_symlink()]
        for entry in [*folder.iterdir(), *(part for other in inside for part in other.iterdir())]:
            _clear(entry)


def _clear(entry: Path) -> None:
    name = entry.name
    target = entry.with_name(name.removeprefix(OLD).removeprefix(WORK))
    if staged_for(name) is not None or (name.startswith(WORK) and is_made(target)):
        _remove(entry)
    elif name.startswith(OLD) and is_made(entry) and not target.exists():
        entry.rename(target)  # its run died between the two renames of `_swap`
    elif name.startswith(OLD) and is_made(entry) and not strangers(entry):
        _discard(entry, target)


def _remove(entry: Path) -> None:
    if entry.is_dir() and not entry.is_symlink():
        shutil.rmtree(entry, ignore_errors=True)
    else:
        entry.unlink(missing_ok=True)


def _discard(old: Path, target: Path) -> None:
    """Remove what was replaced, under a name that is cleared whatever is in it: half of it, after a kill."""
    stage = _stage_of(target)
    old.rename(stage)
    _remove(stage)


def _stage_of(target: Path) -> Path:
    """A name that nobody can foresee, and no file of a killed run has."""
    return target.with_name(f"{STAGE}{target.name}-{secrets.token_hex(8)}")


@contextlib.contextmanager
def staged_folder(target: Path, overwrite: bool = False) -> Iterator[Path]:
    """Yield an empty folder beside `target` that takes its place when the block ends without an error.

    Args:
        target: the final folder; its parents are made.
        overwrite: an existing one is replaced as a whole, if d4c-onnx wrote all that is in it.

    Raises:
        BundleError: the target is there, the disk is full, the place cannot be written, or another run is writing it.
    """
    with claimed(target):
        refuse_existing(target, overwrite)
        stage = _stage_of(target)
        try:
            stage.mkdir()
            yield stage
            for file in sorted(stage.rglob("*")):
                if file.is_file():
                    _fsync(file)
            refuse_existing(target, overwrite)  # somebody may have put something there meanwhile
            _swap(stage, target)
            _fsync(target.parent)
        except OSError as error:
            raise translate_os_error(error, target, _size(stage)) from error
        finally:
            shutil.rmtree(stage, ignore_errors=True)


def _swap(stage: Path, target: Path) -> None:
    old = target.with_name(f"{OLD}{target.name}")
    if target.exists():
        target.rename(old)
    try:
        stage.rename(target)
    except OSError:
        if old.exists():
            old.rename(target)
        raise
    if old.exists():
        _discard(old, target)


def write_text(path: Path, text: str) -> None:
    """Write one text file atomically."""
    write_file(path, lambda file: file.write(text.encode()))


def write_file(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Write one file atomically: `write` is given a temporary one, which takes the path when it is complete.

    Raises:
        BundleError: the disk is full or the place cannot be written.
    """
    temporary, raw = _stage_of(path), None
    try:
        flags = os.O_WRONLY | os.O_CREAT | os.O_EXCL | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_BINARY", 0)
        raw = _Noted(os.open(temporary, flags, 0o666), "wb")
        with io.BufferedWriter(raw) as file:
            write(file)
            file.flush()
            os.fsync(file.fileno())
        temporary.rename(path)
        _fsync(path.parent)
    except OSError as error:
        raise translate_os_error(error, path, _size(temporary)) from error
    except RuntimeError as error:  # torch's of whatever its file raised
        if raw is None or raw.refused is None:
            raise
        raise translate_os_error(raw.refused, path, _size(temporary)) from error
    finally:
        temporary.unlink(missing_ok=True)


class _Noted(io.FileIO):
    """A file that remembers why it could not be written, whatever its writer makes of that."""

    refused: OSError | None = None

    def write(self, data: Any) -> int:
        try:
            return super().write(data)
        except OSError as error:
            self.refused = error
            raise


@contextlib.contextmanager
def temporary_folder(needed: int = 0) -> Iterator[Path]:
    """A folder for what is needed for a moment, where the system keeps such (TMPDIR).

    Args:
        needed: bytes that will be written there.

    Raises:
        BundleError: there is no room for them, or no such place.
    """
    with temporary_room(needed) as place, tempfile.TemporaryDirectory(dir=place, ignore_cleanup_errors=True) as folder:
        yield Path(folder)


@contextlib.contextmanager
def temporary_room(needed: int = 0) -> Iterator[Path]:
    """Where the system keeps what is needed for a moment, for whoever removes its own files later.

    Args:
        needed: bytes that will be written there.

    Raises:
        BundleError: there is no room for them, or no such place; or what is written in the block finds none.
    """
    try:
        place = Path(tempfile.gettempdir())
        free = shutil.disk_usage(place).free
    except OSError as error:
        raise BundleError(f"there is no folder for temporary files ({error}). {_MORE_ROOM}") from error
    if free < needed:
        raise BundleError(
            f"{place}: {_mega(needed)} are needed there for a moment, {_mega(free)} are free. {_MORE_ROOM}"
        )
    try:
        yield place
    except OSError as error:
        if not _is_full(error):
            raise
        left = _mega(shutil.disk_usage(place).free)
        raise BundleError(f"{place}: no space left for temporary files ({left} are free). {_MORE_ROOM}") from error


def write_json(path: Path, value: object) -> None:
    """Write one JSON file atomically, keys in the given order, so that equal values give equal bytes."""
    write_text(path, json.dumps(value, indent=1, ensure_ascii=False) + "\n")


def translate_os_error(error: OSError, target: Path, written: int = 0) -> BundleError:
    """An operating-system error as one that says what to do.

    Args:
        written: bytes that had found room.
    """
    if _is_full(error):
        place = error.filename if isinstance(error.filename, str) else target
        with contextlib.suppress(OSError, StopIteration):
            above = next(path for path in target.absolute().parents if path.exists())
            needs = f"more than {_mega(written)} are needed, " if written else ""
            return BundleError(
                f"{place}: no space left to write ({error.strerror or error}; {needs}"
                f"{_mega(shutil.disk_usage(above).free)} are free on that disk). Free some and run the same command "
                "again: what is finished is kept."
            )
    if error.errno in _CANNOT_WRITE:
        return BundleError(f"{target}: cannot be written ({error.strerror}). Choose another --output.")
    return BundleError(f"{target}: {error.strerror or error}.")


def _is_full(error: OSError) -> bool:
    # numpy reports a short write in words, without an error number
    short_write = error.errno is None and "requested and" in str(error)
    return short_write or error.errno in (errno.ENOSPC, errno.EDQUOT, errno.EFBIG)


def _size(path: Path) -> int:
    """Bytes of a file, or of all below a folder."""
    files = path.rglob("*") if path.is_dir() else [path]
    with contextlib.suppress(OSError):
        return sum(file.stat().st_size for file in files if file.is_file())
    return 0


def _mega(number: int) -> str:
    return f"{number / 1e6:,.1f} MB"


def _fsync(path: Path) -> None:
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
