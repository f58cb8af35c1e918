"""One run at a time in a folder: a lock of the operating system, which ends with its process however that ends.

The lock lies beside the folder, which may not exist yet and may be replaced, and says who holds it. It rests on no
process id: in containers every process may be number 1. Its file is removed by whoever holds it, and only then.
"""

import contextlib
import json
import os
import socket
import sys
import threading
import time
from collections.abc import Iterator
from pathlib import Path
from typing import BinaryIO

import portalocker

from d4c_onnx.errors import BundleError

LOCK = ".lock-"
_SHOWN = 200  # characters of what another run says of itself
_LONGEST = 4096  # bytes of it that are looked at

_held: set[tuple[int, Path]] = set()  # by thread


@contextlib.contextmanager
def locked(folder: Path) -> Iterator[bool]:
    """Hold a folder, and everything below it, against other runs; a thread may hold what it holds already.

    Yields:
        Whether it was not held before.

    Raises:
        BundleError: another run holds it, or the file system knows no locks.
        OSError: the lock's file cannot be made.
    """
    own = (threading.get_ident(), folder.resolve())
    if any((own[0], place) in _held for place in (own[1], *own[1].parents)):
        yield False
        return
    made = _make_parents(folder)
    path = _place(folder)
    try:
        file = _acquire(path, folder)
    except BaseException:
        _remove_empty(made)
        raise
    _held.add(own)
    try:
        yield True
    finally:
        _held.discard(own)
        with contextlib.suppress(OSError):  # Windows removes no open file
            path.unlink()
        file.close()
        _remove_empty(made)


def _place(folder: Path) -> Path:
    """Beside the folder; in it where nobody may write beside it, and nobody can replace it, either."""
    above = folder.resolve().parent
    return above / f"{LOCK}{folder.resolve().name}" if os.access(above, os.W_OK) else folder / f"{LOCK}self"


def _acquire(path: Path, folder: Path) -> BinaryIO:
    while True:
        flags = os.O_RDWR | os.O_CREAT | getattr(os, "O_NOFOLLOW", 0)
        try:
            file = os.fdopen(os.open(path, flags, 0o666), "r+b")
        except FileNotFoundError:  # a run that was refused has just removed the folder above, which it had made
            path.parent.mkdir(parents=True, exist_ok=True)
            continue
        except PermissionError:
            if not os.path.lexists(path):
                raise
            _remove_strangers(path, folder)
            continue
        try:
            _lock(file, folder)
            if _is_at(file, path):
                file.truncate()
                file.write(json.dumps(_myself()).encode())
                file.flush()
                return file
            file.close()  # whoever held it has removed it in between
        except portalocker.exceptions.LockException as error:
            file.close()
            raise BundleError(
                f"{folder}: its file system knows no locks, so two runs could write there at once ({error}). Choose an "
                "--output elsewhere."
            ) from error
        except BaseException:
            file.close()
            raise


def _remove_strangers(path: Path, folder: Path) -> None:
    """Take away the lock of another account's killed run, which this one may not write.

    Raises:
        BundleError: that run is alive, or its file is its owner's to remove, as in a folder that all may write.
    """
    # neither a link nor a pipe that was planted there is followed or waited for
    flags = os.O_RDONLY | getattr(os, "O_NOFOLLOW", 0) | getattr(os, "O_NONBLOCK", 0)
    try:
        with os.fdopen(os.open(path, flags), "rb") as file:
            _lock(file, folder)
            if _is_at(file, path):
                path.unlink()
    except FileNotFoundError:  # it has ended meanwhile
        return
    except (OSError, portalocker.exceptions.LockException) as error:
        raise BundleError(
            f"{folder}: {path} belongs to a run of another account. If that has ended, ask its owner to remove the "
            "file, or choose another --output."
        ) from error


def _lock(file: BinaryIO, folder: Path) -> None:
    """Raises BundleError: another run holds it."""
    try:
        portalocker.lock(file, portalocker.LockFlags.EXCLUSIVE | portalocker.LockFlags.NON_BLOCKING)
    except portalocker.exceptions.AlreadyLocked as error:
        raise BundleError(
            f"{folder}: another run is writing there ({_other(file)}). Wait until it has ended, or choose another "
            "--output."
        ) from error


def _is_at(file: BinaryIO, path: Path) -> bool:
    try:
        return os.path.samestat(os.fstat(file.fileno()), path.lstat())
    except FileNotFoundError:
        return False


def _myself() -> dict[str, str]:
    command = " ".join([Path(sys.argv[0]).name, *sys.argv[1:]]) if sys.argv else "python"
    since = time.strftime("%Y-%m-%d %H:%M:%S")
    return {"host": socket.gethostname(), "process": str(os.getpid()), "since": since, "command": command[:_SHOWN]}


def _other(file: BinaryIO) -> str:
    """What the holder says of itself, which anybody may have written."""
    try:
        told = json.loads(file.read(_LONGEST))
        words = ", ".join(f"{name} {told[name]}" for name in ("host", "process", "since", "command"))
    except (OSError, ValueError, KeyError, TypeError, RecursionError):
        return "which does not say which"
    return "".join(letter if letter.isprintable() else "?" for letter in words)[: 2 * _SHOWN]


def _make_parents(folder: Path) -> list[Path]:
    """Make the folders above, and tell which there were not, the deepest first."""
    above = folder.absolute().parent
    missing = [path for path in (above, *above.parents) if not path.exists()]
    above.mkdir(parents=True, exist_ok=True)
    return missing


def _remove_empty(folders: list[Path]) -> None:
    """Take away what stayed empty: a run that was refused leaves nothing."""
    with contextlib.suppress(OSError):
        for folder in folders:
            folder.rmdir()
