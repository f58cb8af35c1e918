"""Renew every table of the documents from the result files in docs/results/.

    python benchmarks/document.py            # write
    python benchmarks/document.py --check    # exit code 1 where a document is not what the result files say
    d4c-onnx benchmark A B --json > report.json
    python benchmarks/document.py --add speed-mine report.json --command "d4c-onnx benchmark A B --json"

A table stands between `<!-- table VIEW FILE ... key=value ... -->` and `<!-- /table -->`: VIEW is a function of
benchmarks/tables.py, FILE a result file without its ending (`recipe_keys` needs none), the rest the view's arguments.
Below each table stands what it was measured on, with links to its files, which hold the commands.
"""

import argparse
import json
import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path

from results import FOLDER, ROOT, ResultFile, of_benchmark, read_results
from tables import VIEWS

_TABLE = re.compile(r"(<!-- table (?P<ask>[^\n]+?) -->\n).*?(<!-- /table -->)", re.DOTALL)


def documents() -> list[Path]:
    """Every document that may hold tables."""
    return [ROOT / "README.md", *sorted((ROOT / "docs").glob("*.md"))]


def renewed(text: str, beside: Path, folder: Path = FOLDER) -> str:
    """A document's text with its tables made anew.

    Args:
        beside: the document's folder, for its links.
        folder: of the result files.

    Raises:
        SystemExit: a table asks for a view or a file that is not there.
    """

    def table(match: re.Match[str]) -> str:
        view, *words = shlex.split(match["ask"])
        if view not in VIEWS:
            raise SystemExit(f"<!-- table {match['ask']} -->: no view {view!r}. Use one of {', '.join(VIEWS)}.")
        files = [read_results(word, folder) for word in words if "=" not in word]
        options = dict(word.split("=", 1) for word in words if "=" in word)
        parts = [_markdown(VIEWS[view](files, **options)), *([_source(files, beside, folder)] if files else [])]
        return match[1] + "\n\n".join(parts) + f"\n{match[3]}"

    return _TABLE.sub(table, text)


def results_used(text: str) -> set[str]:
    """The result files that a document's tables are made of."""
    return {word for match in _TABLE.finditer(text) for word in shlex.split(match["ask"])[1:] if "=" not in word}


def _markdown(table: Sequence[Sequence[str]]) -> str:
    head, *rows = [f"| {' | '.join(row)} |" for row in table]
    return "\n".join([head, f"|{'---|' * len(table[0])}", *rows])


def _source(files: Sequence[ResultFile], beside: Path, folder: Path) -> str:
    """What a table was measured on: processors once, each with its commits and files."""
    grouped: dict[str, list[str]] = {}
    for file in files:
        threads = f", {file.machine['threads']} threads" if file.machine.get("threads", 1) not in (1, None) else ""
        runtime = next((f", {name} {file.versions[name]}" for name in _RUNTIMES if name in file.versions), "")
        where = f"{file.machine.get('gpu') or file.machine['cpu']}{threads}{runtime}"
        link = Path(os.path.relpath(folder / f"{file.name}.json", beside)).as_posix()
        grouped.setdefault(where, []).append(f"[{file.name}]({link}) at {file.commit}")
    return "\n".join(f"*{where}: {', '.join(found)}.*" for where, found in grouped.items())


_RUNTIMES = ("onnxruntime-gpu", "onnxruntime")


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--check", action="store_true", help="write nothing; exit code 1 where something would change")
    parser.add_argument("--add", nargs=2, metavar=("NAME", "REPORT"), help="a report of d4c-onnx benchmark --json")
    parser.add_argument("--command", help="the command line that printed the report, for --add")
    args = parser.parse_args()
    if args.add:
        if not args.command:
            parser.error("--add needs --command: a result file says how to make it again")
        of_benchmark(json.loads(Path(args.add[1]).read_text("utf-8")), args.command).write(
            FOLDER / f"{args.add[0]}.json"
        )
        return
    stale = []
    for path in documents():
        text = path.read_text("utf-8")
        fresh = renewed(text, path.parent)
        if fresh != text:
            stale.append(str(path.relative_to(ROOT)))
            if not args.check:
                path.write_text(fresh, "utf-8")
    for name in stale:
        print(f"{name}: {'is not what docs/results says' if args.check else 'renewed'}")
    if args.check and stale:
        raise SystemExit("Run python benchmarks/document.py.")


if __name__ == "__main__":
    main()
