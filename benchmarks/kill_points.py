"""Kill a run at each of its writes, renames and removals: the harness of `kill_sweep.py` and of a test.

A run is a function that a forked child calls. Python tells an audit hook of every file that is opened, renamed or
removed before it happens; the hook counts those in the run's folder, and at one of them the process ends as under
kill -9: no `finally`, no `atexit`, no buffer written.
"""

import contextlib
import os
import sys
import traceback
from collections.abc import Callable, Iterator
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from d4c_onnx.files import sha256

KILLED, FAILED = 137, 3
_WRITING = os.O_WRONLY | os.O_RDWR | os.O_CREAT | os.O_TRUNC
_EVENTS = ("os.rename", "os.remove", "os.rmdir", "os.mkdir", "os.truncate", "os.link", "os.symlink")


@dataclass(frozen=True)
class Rerun:
    """What a kill and the same run again came to.

    Attributes:
        gone: files that were finished before, that the whole run ends with, too, and that were nowhere after the kill
            alone: the rerun brought them back, or `wrong` says so.
        wrong: what the rerun did otherwise than the run that was not killed; "" for nothing.
    """

    gone: int
    wrong: str


@dataclass(frozen=True)
class Ended:
    """How a child ended: its exit code, and how many writes, renames and removals it came to."""

    code: int
    events: int


def run(work: Callable[[], object], folder: Path, kill_at: int | None = None) -> Ended:
    """Call `work` in a child, which dies before its event number `kill_at` (from 0) in or below a folder."""
    reader, writer = os.pipe()
    sys.stdout.flush()  # or the child would write it once more
    child = os.fork()
    if child == 0:
        os.close(reader)
        _watch(folder, kill_at, writer)
        code = 0
        try:
            work()
        except BaseException:
            traceback.print_exc()
            code = FAILED
        sys.stdout.flush()
        sys.stderr.flush()
        os._exit(code)
    os.close(writer)
    with os.fdopen(reader, "rb") as told:
        events = len(told.read())
    _, status = os.waitpid(child, 0)
    return Ended(os.waitstatus_to_exitcode(status), events)


def sweep(
    work: Callable[[], object], folder: Path, prepare: Callable[[], None], most: int | None = None
) -> Iterator[tuple[int, Rerun]]:
    """Kill a run at each of its events, or at `most` of them, and run it again: each event, and what came of it.

    Args:
        prepare: makes the folder as it is before the run.
        most: how many events are tried, evenly spread.
    """
    prepare()
    before = set(content(folder).values())
    whole = run(work, folder)
    expected = content(folder)
    finished = before & set(expected.values()) - {""}
    if whole.code:
        raise RuntimeError(f"the run fails without being killed (exit code {whole.code})")
    step = 1 if most is None else max(1, whole.events / most)
    for number in sorted({int(index * step) for index in range(int(whole.events / step))}):
        prepare()
        killed = run(work, folder, number)
        kept, again = set(content(folder).values()), run(work, folder)
        found = content(folder)
        if killed.code != KILLED:
            wrong = f"was not killed, exit code {killed.code}"
        elif again.code:
            wrong = f"the rerun fails, exit code {again.code}"
        else:
            wrong = ", ".join(_differences(found, expected))
        yield number, Rerun(len(finished - kept), wrong)


def content(folder: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder, hidden ones included; folders are named, too."""
    return {
        path.relative_to(folder).as_posix(): sha256(path) if path.is_file() else ""
        for path in sorted(folder.rglob("*"))
    }


def _differences(found: dict[str, str], expected: dict[str, str]) -> list[str]:
    left = [f"left: {name}" for name in sorted(found.keys() - expected.keys())]
    lost = [f"missing: {name}" for name in sorted(expected.keys() - found.keys())]
    both = sorted(found.keys() & expected.keys())
    return [*left, *lost, *(f"differs: {name}" for name in both if found[name] != expected[name])]


def _watch(folder: Path, kill_at: int | None, writer: int) -> None:
    """Count this process's events in a folder, and end it at one of them. A hook stays until its process ends."""
    place, seen = os.fspath(folder.resolve()), 0

    def hook(event: str, arguments: tuple[Any, ...]) -> None:
        nonlocal seen
        if not _is_change(event, arguments, place):
            return
        if seen == kill_at:
            os._exit(KILLED)
        seen += 1
        os.write(writer, b".")

    sys.addaudithook(hook)


def _is_change(event: str, arguments: tuple[Any, ...], place: str) -> bool:
    if event == "open":
        name, mode, flags = arguments
        writes = bool((flags or 0) & _WRITING) or any(letter in str(mode or "") for letter in "wax+")
        return writes and _is_below(name, place)
    # shutil.rmtree names files by an open folder
    return event in _EVENTS and (_is_below(arguments[0], place) or arguments[-1] not in (-1, None))


def _is_below(name: object, place: str) -> bool:
    if isinstance(name, int):  # an open file
        return False
    with contextlib.suppress(TypeError, ValueError):
        path = os.path.abspath(os.fsdecode(name))  # type: ignore[arg-type]
        return path == place or path.startswith(place + os.sep)
    return False
