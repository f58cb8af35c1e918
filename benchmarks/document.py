"""What the measuring scripts share: one command line, results that are saved as they come, a table in a document."""

import argparse
import json
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path

Results = dict[str, dict]


def run(
    description: str,
    results_file: str,
    models: Sequence[str],
    measure: Callable[[argparse.Namespace, Results], Iterator[None]],
    table: Callable[[Results], str],
    picture: Callable[[Results, Path], None],
) -> None:
    """Measure what is missing, saving after each group; print the table, and put it into a document.

    Args:
        measure: fills in missing rows and yields after each group of them.
        table, picture: show all results.
    """
    parser = argparse.ArgumentParser(description=description)
    parser.add_argument("-o", "--output", default="exported")
    parser.add_argument("--train", type=Path, help="parquet with training images, for the `real` control")
    parser.add_argument("--models", nargs="+", default=list(models))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--only", default="", help="regular expression over the rows' names")
    parser.add_argument("--group", type=int, default=6, help="rows between two savings of the results")
    parser.add_argument("--results", type=Path, default=Path(results_file))
    parser.add_argument("--write", type=Path, help="document whose table and picture are renewed")
    parser.add_argument("--table-only", action="store_true", help="measure nothing")
    args = parser.parse_args()
    results: Results = json.loads(args.results.read_text()) if args.results.exists() else {}
    for _ in [] if args.table_only else measure(args, results):
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1))
    print(table(results))
    if args.write:
        write_document(args.write, table(results))
        picture(results, args.write.with_suffix(".png"))


def each_seed(points: Sequence[float]) -> str:
    """A table's cell: the mean in bold, then every seed."""
    return f"**{sum(points) / len(points):+.2f}** ({', '.join(f'{value:+.2f}' for value in points)})"


def write_document(path: Path, text: str) -> None:
    """Replace what stands between the document's `<!-- table -->` markers."""
    before, _, rest = path.read_text("utf-8").partition("<!-- table -->\n")
    _, _, after = rest.partition("<!-- /table -->\n")
    path.write_text(f"{before}<!-- table -->\n{text}\n<!-- /table -->\n{after}", "utf-8")
