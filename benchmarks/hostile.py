"""A long campaign of spoilt inputs: each must end in an answer or in one message.

    python benchmarks/hostile.py --cases 3000 --minutes 60 --keep failures/ --results docs/results/hostile.json

Every case is a whole command on a spoilt copy (`spoils`). A child runs one after the other, and is replaced when one
ends it. A failure is a traceback, an exit code beyond 0, 1 and 2, more than 60 seconds or 2 GB, exit code 0 on what
cannot be right, an input that changed, or anything left beside it, in the folder for temporary files, or half-written
in the output. The spoilt parts of failures are kept. Exit code 1 when there are any.
"""

import argparse
import contextlib
import json
import os
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
import traceback
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from itertools import islice
from pathlib import Path
from typing import Any

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import hostile_origin
import results
import spoils
from kill_points import content

from d4c_onnx.cli.main import group

MADE = ("imported/w8a8/", "imported/calibration-")
SECONDS, KILOBYTES = 60, 2 * 2**20
A_CHILD = 200  # cases, before another one takes over


@dataclass
class Found:
    """What came of one case."""

    number: int
    kind: str
    command: str = ""
    code: int = 0
    wrong: str = ""
    seconds: float = 0.0


@dataclass
class Campaign:
    """Where it runs, and what came of it.

    Attributes:
        place: a folder with `origin`; the cases run below it.
        keep: where failing inputs go.
    """

    place: Path
    seed: int
    keep: Path | None
    tried: Counter[str] = field(default_factory=Counter)
    codes: Counter[tuple[str, int]] = field(default_factory=Counter)
    failed: list[Found] = field(default_factory=list)

    def run(self, first: int, cases: int, end: float) -> None:
        """Cases from one number on, as far as the time goes."""
        number = first
        while number < first + cases and time.monotonic() < end:
            number = self._child(number, first + cases, end)

    def _child(self, first: int, last: int, end: float) -> int:
        """Cases of one child; the number of the next one."""
        reader, writer = os.pipe()
        child = os.fork()
        if child == 0:
            os.close(reader)
            try:
                self._work(first, min(first + A_CHILD, last), end, writer)
            except BaseException:
                traceback.print_exc()
            finally:  # a fault of the campaign's own: the case counts as one that ended its process
                sys.stdout.flush()
                os._exit(3)
        os.close(writer)
        running: Found | None = None
        number, killed = first, ""
        for line in _lines(reader, child):
            if line is None:
                killed = f"more than {SECONDS} seconds"
                continue
            told = Found(**json.loads(line))
            if not told.command:
                running = told
                continue
            self._count(told)
            running, number = None, told.number + 1
        _, status = os.waitpid(child, 0)
        if running is not None:
            code = os.waitstatus_to_exitcode(status)
            running.code, running.wrong = code, killed or f"the process ended with exit code {code}"
            with contextlib.suppress(OSError):
                running.command = (self.place / "command").read_text()
            self._keep(running)
            self._count(running)
            number = running.number + 1
        return number

    def _count(self, found: Found) -> None:
        self.tried[found.kind] += 1
        self.codes[found.kind, found.code] += 1
        if found.wrong:
            self.failed.append(found)
            print(f"case {found.number} ({found.kind}): {found.command}\n  {found.wrong}", flush=True)

    def _work(self, first: int, last: int, end: float, writer: int) -> None:
        """The child: cases one by one, each told before and after."""

        def tell(found: Found) -> None:
            os.write(writer, json.dumps(found.__dict__).encode() + b"\n")

        (self.place / "tmp").mkdir(exist_ok=True)
        tempfile.tempdir = str(self.place / "tmp")
        for number, (kind, draw) in enumerate(islice(spoils.order(self.seed), first, last), first):
            if time.monotonic() > end:
                break
            found = Found(number, kind)
            tell(found)
            _case(self.place, spoils.KINDS[kind], draw, found)
            self._keep(found)
            tell(found)
            if resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > KILOBYTES * 0.75:
                break
        os._exit(0)

    def _keep(self, found: Found) -> None:
        """Of a failure the parts that are not as in the origin, what was run, and what it said."""
        if self.keep is None or not found.wrong:
            return
        target, before = self.keep / f"{self.seed}-{found.number}", _files(self.place / "origin")
        target.mkdir(parents=True, exist_ok=True)
        for name, digest in _files(self.place / "case").items():
            if before.get(name) != digest:
                (target / name).parent.mkdir(parents=True, exist_ok=True)
                shutil.copyfile(self.place / "case" / name, target / name)
        for name in ("command", "said"):
            (self.place / name).touch()
            shutil.copyfile(self.place / name, target / name)

    def rows(self) -> list[dict[str, Any]]:
        """A row a kind, for the result file."""
        return [
            {
                "kind": kind,
                "cases": count,
                "answered": self.codes[kind, 0],
                "check failed": self.codes[kind, 1],
                "refused": self.codes[kind, 2],
                "failures": sum(found.kind == kind for found in self.failed),
            }
            for kind, count in self.tried.items()
        ]


def _lines(reader: int, child: int) -> Iterator[str | None]:
    """What a child says; None once, when it says nothing for too long and is killed."""
    kept = b""
    while True:
        if not select.select([reader], [], [], SECONDS)[0]:
            os.kill(child, signal.SIGKILL)
            yield None
        part = os.read(reader, 2**16)
        if not part:
            os.close(reader)
            return
        *whole, kept = (kept + part).split(b"\n")
        yield from (line.decode() for line in whole)


def _case(place: Path, kind: spoils.Kind, draw: Any, found: Found) -> None:
    """Spoil, run, and look at what is left."""
    case, out = place / "case", place / "out"
    for folder in (case, out):
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir()
    for part in kind.parts:
        source = place / "origin" / part
        (shutil.copytree if source.is_dir() else shutil.copyfile)(source, case / part)
    spoilt = kind.spoil(case, draw)
    command = [word.format(place=case, out=out) for word in spoilt.command]
    found.command = " ".join(command)[:400].replace(f"{place}/", "")
    (place / "command").write_text(found.command)
    (place / "said").write_text("")
    before, start = _files(case), time.monotonic()
    found.code = _command([*command, "--json", "--quiet"], place / "said")
    found.seconds = round(time.monotonic() - start, 2)
    said = (place / "said").read_text("utf-8", "replace")
    after, kilobytes = _files(case), resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    # a bundle that is quantised, or gives a set, gets it beside its files
    changed = [name for name in before.keys() | after.keys() if before.get(name) != after.get(name)]
    changed = sorted(name for name in changed if name in before or not name.startswith(MADE))
    half = [path.name for path in out.rglob(".*") if path.name.startswith((".stage-", ".old-"))]
    left = [path.name for path in (place / "tmp").iterdir() if not path.name.startswith("torchinductor")]
    faults = {
        "traceback": "Traceback" in said or "panicked at" in said,
        f"exit code {found.code}": found.code not in (0, 1, 2),
        f"{kilobytes // 1024} MB": kilobytes > KILOBYTES,
        "exit code 0 on garbage": found.code == 0 and (spoilt.wrong or "NaN" in said),
        "no message": found.code == 2 and '"error"' not in said,
        "a long message": found.code == 2 and len(said) > 5000,
        f"{found.seconds} seconds": found.seconds > SECONDS,
        f"changed {changed[:3]}": bool(changed),
        f"left {(half + left)[:3]}": bool(half or left),
    }
    for name in left:
        shutil.rmtree(place / "tmp" / name, ignore_errors=True)
    wrong = ", ".join(name for name, fault in faults.items() if fault)
    found.wrong = f"{wrong}: {said.strip()[-300:]}" if wrong else ""


def _command(command: list[str], said: Path) -> int:
    """The exit code of one command in this very process; all it says goes to a file."""
    told = os.open(said, os.O_WRONLY | os.O_CREAT | os.O_TRUNC)
    kept = os.dup(1), os.dup(2)
    os.dup2(told, 1)
    os.dup2(told, 2)
    arguments, sys.argv = sys.argv, ["d4c-onnx", *command]
    code = 99
    try:
        group(command, prog_name="d4c-onnx")
    except SystemExit as ended:
        code = ended.code if isinstance(ended.code, int) else 98
    except BaseException:
        traceback.print_exc()
    with contextlib.suppress(Exception):
        sys.stdout.flush()
        sys.stderr.flush()
    sys.argv = arguments
    for descriptor, own in enumerate(kept, 1):
        os.dup2(own, descriptor)
        os.close(own)
    os.close(told)
    return code


def _files(place: Path) -> dict[str, str]:
    """SHA-256 of each file below a folder."""
    return {name: digest for name, digest in content(place).items() if digest}


def _prepare(origin: Path) -> None:
    """In a child: sessions start threads, and what forks must not have any."""
    child = os.fork()
    if child == 0:
        hostile_origin.make(origin)
        os._exit(_wrong_unspoilt(origin))
    if os.waitpid(child, 0)[1]:
        sys.exit("the inputs could not be made, or a command is refused though nothing is spoilt")


def _wrong_unspoilt(origin: Path) -> bool:
    """Whether a command fails on what is whole: then a refusal would prove nothing."""
    place = origin.parent / "whole"
    shutil.copytree(origin, place)
    wrong = False
    for number, words in enumerate(spoils.COMMANDS):
        command = [word.format(place=place, out=place / f"out-{number}") for word in words]
        (place / f"out-{number}").mkdir()
        if _command([*command, "--json", "--quiet"], place / "said"):
            wrong = True
            print(" ".join(words), (place / "said").read_text(), flush=True)
    return wrong


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--cases", type=int, default=200)
    parser.add_argument("--first", type=int, default=0, help="number of the first case, to try one again")
    parser.add_argument("--minutes", type=float, default=20)
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--keep", type=Path, help="where failing inputs go")
    parser.add_argument("--results", type=Path, help="result file to write: counts per kind")
    args = parser.parse_args()
    end = time.monotonic() + 60 * args.minutes
    with tempfile.TemporaryDirectory() as folder:
        campaign = Campaign(Path(folder), args.seed, args.keep)
        _prepare(campaign.place / "origin")
        campaign.run(args.first, args.cases, end)
    for row in campaign.rows():
        print(", ".join(f"{value} {key}" if key != "kind" else str(value) for key, value in row.items()))
    print(f"{campaign.tried.total()} cases, {len(campaign.failed)} failures")
    if args.results:
        columns = [("kind", "what was spoilt", ""), *((key, key, "d") for key in ROW)]
        results.measured_here(campaign.rows(), columns=columns).write(args.results)
    sys.exit(bool(campaign.failed))


ROW = ("cases", "answered", "check failed", "refused", "failures")

if __name__ == "__main__":
    main()
