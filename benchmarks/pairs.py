"""Two runs at once into one folder: both right, or one refused by name, and nothing finished is ever lost.

    python benchmarks/pairs.py --pairs 20 --results docs/results/pairs.json

The runs are the miniature ones that `tests/hostile` kills: a second one starts up to a few milliseconds after the
first, from nothing, onto a finished bundle, and with --overwrite. Exit code 1 when something is lost or left.
"""

import argparse
import os
import random
import shutil
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Callable, Sequence
from pathlib import Path

os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")
sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "tests" / "hostile"))

import kill_points
import killed_runs
import results

from d4c_onnx.errors import BundleError

DONE, REFUSED, FAILED = 0, 2, 3
Run = Callable[[Path], None]
# name -> what lies there before, and the two runs
PAIRS: dict[str, tuple[str, Run, Run]] = {
    "from nothing": ("", killed_runs.export, killed_runs.export),
    "two sets": ("exported", killed_runs.synthesize, killed_runs.synthesize),
    "two quantisations": ("exported", killed_runs.quantize, killed_runs.quantize),
    "a set beside a quantisation": ("exported", killed_runs.synthesize, killed_runs.quantize),
    "--overwrite of finished work, twice": ("finished", killed_runs.replace, killed_runs.replace),
    "--overwrite beside a rerun": ("finished", killed_runs.replace, killed_runs.quantize),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--pairs", type=int, default=20, help="of each kind")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="result file to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        rows = _all(Path(folder), args.pairs, random.Random(args.seed))
    for row in rows:
        print(", ".join(f"{key} {value}" for key, value in row.items()))
    if args.results:
        columns = [("pair", "two runs at once", ""), *((key, key, "d") for key in _COUNTS)]
        results.measured_here(rows, threads=1, columns=columns).write(args.results)
    sys.exit(any(row["failures"] for row in rows))


_COUNTS = ("pairs", "both done", "one refused", "failures")


def _all(place: Path, pairs: int, draw: random.Random) -> list[dict[str, object]]:
    killed_runs.export(place / "exported")
    for make in (killed_runs.export, killed_runs.synthesize, killed_runs.quantize):
        make(place / "finished")
    rows = []
    for name, (before, *runs) in PAIRS.items():
        allowed = [_left(place, before, order) for order in (runs[:1], runs[1:], runs, runs[::-1])]
        ended: Counter[str] = Counter()
        for number in range(pairs):
            how = _pair(_prepared(place, before), runs, draw.choice((0.0, 0.001, 0.003, 0.01)), allowed)
            ended[how] += 1
            if how not in _COUNTS:
                print(f"{name}, pair {number}: {how}", flush=True)
        fine = ended["both done"], ended["one refused"]
        counts = (pairs, *fine, pairs - sum(fine))
        rows.append({"pair": name, **dict(zip(_COUNTS, counts, strict=True))})
    return rows


def _prepared(place: Path, before: str) -> Path:
    """The folder that the runs write, as it is before them."""
    out = place / "out"
    shutil.rmtree(out, ignore_errors=True)
    out.mkdir()
    if before:
        shutil.copytree(place / before, out / "tiny")
    return out / "tiny"


def _left(place: Path, before: str, runs: Sequence[Run]) -> dict[str, str]:
    """What runs leave that come one after the other."""
    folder = _prepared(place, before)
    first, *_ = [_end(_start(run, folder)) for run in runs]
    if first != DONE:
        raise SystemExit("a run fails that is alone")
    return kill_points.content(folder.parent)


def _pair(folder: Path, runs: Sequence[Run], apart: float, allowed: Sequence[dict[str, str]]) -> str:
    """How one pair ended: `both done`, `one refused`, or what is wrong."""
    first = _start(runs[0], folder)
    time.sleep(apart)
    second = _start(runs[1], folder)
    codes = [_end(first), _end(second)]
    found = kill_points.content(folder.parent)
    if not set(codes) <= {DONE, REFUSED} or codes == [REFUSED, REFUSED]:
        return f"exit codes {codes}"
    if found not in allowed:
        return f"left {sorted(found.keys() ^ allowed[-1].keys())[:5]}, or other bytes"
    return "both done" if codes == [DONE, DONE] else "one refused"


def _start(run: Run, folder: Path) -> int:
    """The process of a run."""
    child = os.fork()
    if child == 0:
        code = FAILED
        try:
            run(folder)
            code = DONE
        except BundleError as error:
            code = REFUSED if "another run" in str(error) or "already exists" in str(error) else FAILED
            if code == FAILED:
                print(error, flush=True)
        finally:
            os._exit(code)
    return child


def _end(child: int) -> int:
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


if __name__ == "__main__":
    main()
