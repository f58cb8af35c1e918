"""Result files: what a measuring script found, with all that has to be known about it, as JSON in docs/results/.

    {"machine": {"cpu": ..., "threads": 2}, "versions": {"onnxruntime": ...}, "commit": "1234567",
     "command": [...], "note": "", "columns": [[key, title, format], ...], "rows": [{...}, ...]}

`python benchmarks/document.py` makes the documents' tables of them. `columns` is there only where a table shows the
rows as they are.
"""

import argparse
import json
import shlex
import subprocess
import sys
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass, field
from importlib import metadata
from pathlib import Path
from typing import Any

from d4c_onnx.evaluation.latency import describe_machine
from d4c_onnx.files import write_text

ROOT = Path(__file__).resolve().parents[1]
FOLDER = ROOT / "docs" / "results"
_PACKAGES = ("d4c-onnx", "numpy", "onnx", "onnxruntime", "onnxruntime-gpu", "open_clip_torch", "torch")

VERSUS_FP32 = (
    ("agreement", "agreement %", ".2f"),
    ("cosine_image", "cosine image", ".4f"),
    ("cosine_text", "cosine text", ".4f"),
)
"""Columns of how a bundle's answers compare with its original's."""
MEASURES = (*(key for key, *_ in VERSUS_FP32), "similarity_rmse")
"""The same of answers without labels, and the error of all similarities."""

Measured = dict[str, dict]  # a row's name, which holds its seed -> what was measured


@dataclass(frozen=True, slots=True)
class ResultFile:
    """One run of one script on one machine at one commit.

    Attributes:
        machine: `cpu`, `threads`, `provider`, and `gpu` where there is one.
        versions: package -> version.
        commit: of this project; `-dirty` behind it where files had changed.
        command: the lines that make the file again.
        columns: (key, title, format) of each column where a table shows the rows as they are.
        name: the file's, without its ending.
    """

    machine: Mapping[str, Any]
    versions: Mapping[str, str]
    commit: str
    command: Sequence[str]
    rows: Sequence[dict[str, Any]]
    note: str = ""
    columns: Sequence[Sequence[str]] = ()
    name: str = field(default="", compare=False)

    def write(self, path: Path) -> None:
        """One row a line, so that a difference between two runs can be read; atomically, since some take hours."""
        kept = {key: getattr(self, key) for key in ("machine", "versions", "commit", "command", "note", "columns")}
        lines = [
            f" {json.dumps(key)}: {json.dumps(value)}" for key, value in kept.items() if value or key == "versions"
        ]
        rows = ",\n".join(f"  {json.dumps(row)}" for row in self.rows)
        path.parent.mkdir(parents=True, exist_ok=True)
        content = ",\n".join([*lines, f' "rows": [\n{rows}\n ]'])
        write_text(path, f"{{\n{content}\n}}\n")


def read_results(name: str, folder: Path = FOLDER) -> ResultFile:
    """The file of that name.

    Raises:
        SystemExit: there is none, or it lacks a part.
    """
    path = folder / f"{name}.json"
    try:
        return ResultFile(**json.loads(path.read_text("utf-8")), name=name)
    except (OSError, ValueError, TypeError) as error:
        raise SystemExit(f"{path}: is no result file ({error}). benchmarks/results.py says what one holds.") from error


def measured_here(
    rows: Sequence[dict[str, Any]],
    *,
    threads: int = 0,
    note: str = "",
    columns: Sequence[Sequence[str]] = (),
) -> ResultFile:
    """Rows that the running script has just measured, with this machine, these versions and this commit."""
    machine = asdict(describe_machine("cpu", threads))
    return ResultFile(_without_version(machine), _versions(), _commit(), [_command_line()], rows, note, columns)


def of_benchmark(report: Mapping[str, Any], command: str) -> ResultFile:
    """What `d4c-onnx benchmark --json` printed, at the commit that is checked out.

    Args:
        command: the whole line.
    """
    rows = [{"tower": tower, **row} for tower, entries in report["towers"].items() for row in entries]
    return ResultFile(_without_version(report["machine"]), _versions(report["machine"]), _commit(), [command], rows)


def run(
    description: str,
    cache: str,
    models: Sequence[str],
    measure: Callable[[argparse.Namespace, Measured], Iterator[None]],
    summarize: Callable[[Measured], list[dict[str, Any]]],
    picture: Callable[[Measured, Path], None] | None = None,
) -> None:
    """The command line of a script whose rows take hours: measure what is missing, and save after each group.

    Args:
        cache: file of the rows measured so far; rows that it holds are not measured again.
        measure: fills in missing rows and yields after each group of them.
        summarize: the result file's rows, each with all its seeds.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-o", "--output", default="exported")
    parser.add_argument("--train", type=Path, help="parquet with training images, for the `real` control")
    parser.add_argument("--models", nargs="+", default=list(models))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", default="", help="regular expression over the rows' names")
    parser.add_argument("--group", type=int, default=6, help="rows between two savings of the cache")
    parser.add_argument("--cache", type=Path, default=Path(cache), help="rows measured so far, at this commit")
    parser.add_argument("--results", type=Path, help="result file to write, such as docs/results/NAME.json")
    if picture:
        parser.add_argument("--picture", type=Path, help="picture to draw (needs matplotlib)")
    args = parser.parse_args()
    found: Measured = json.loads(args.cache.read_text()) if args.cache.exists() else {}
    for _ in measure(args, found):
        args.cache.parent.mkdir(parents=True, exist_ok=True)
        args.cache.write_text(json.dumps(found, indent=1))
    rows = summarize(found)
    if args.results:
        measured_here(rows).write(args.results)
    else:
        print(json.dumps(rows, indent=1))
    if picture and args.picture:
        picture(found, args.picture)


def _without_version(machine: Mapping[str, Any]) -> dict[str, Any]:
    return {key: value for key, value in machine.items() if key != "onnxruntime" and value is not None}


def _versions(machine: Mapping[str, Any] | None = None) -> dict[str, str]:
    """Of the packages that shape results; what a report says of itself comes first."""
    found = {}
    for name in _PACKAGES:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found | ({"onnxruntime": machine["onnxruntime"]} if machine else {})


def _commit() -> str:
    """Raises SystemExit outside a clone: a number without a commit is worth nothing."""
    command = ["git", "describe", "--always", "--dirty", "--abbrev=7", "--exclude=*"]
    done = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{ROOT}: no commit to name ({done.stderr.strip()}). Run this in a clone of the repository.")
    return done.stdout.strip()


def _command_line() -> str:
    """This script's command line; folders of this machine are cut down to their names."""
    script = Path(sys.argv[0]).resolve()
    shown = script.relative_to(ROOT) if script.is_relative_to(ROOT) else Path(script.name)
    arguments = [Path(part).name if Path(part).is_absolute() else part for part in sys.argv[1:]]
    return shlex.join(["python", str(shown), *arguments])
