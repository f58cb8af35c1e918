"""What a person or a machine sees: progress on stderr, one table or one JSON object on stdout."""

import contextlib
import json
import sys
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from typing import TypeVar, cast

import click

from d4c_onnx.errors import CheckFailed, Report
from d4c_onnx.manifest import Manifest
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.results import Accuracy, Promise, Versus

R = TypeVar("R", bound=Report)

_BAR_WIDTH = 20


@contextlib.contextmanager
def progress(quiet: bool) -> Iterator[OnStep]:
    """A rich progress bar per stage on stderr; plain silence with --quiet."""
    if quiet:
        yield silent
        return
    from rich.console import Console, RenderableType
    from rich.progress import BarColumn, Progress, TaskID, TextColumn, TimeElapsedColumn, TimeRemainingColumn
    from rich.text import Text

    class Stages(Progress):
        """The stages, and below them what the last one reports: beside a bar a narrow terminal has no room for it."""

        values = ""

        def get_renderables(self) -> Iterable[RenderableType]:
            yield self.make_tasks_table(self.tasks)
            if self.values:
                yield Text(f"  {self.values}")

    columns = (
        TextColumn("{task.description:<11}"),
        BarColumn(_BAR_WIDTH),
        TextColumn("{task.percentage:>3.0f}%"),
        TimeElapsedColumn(),
        TextColumn("left"),
        TimeRemainingColumn(),
    )
    with Stages(*columns, console=Console(stderr=True)) as bar:
        tasks: dict[str, TaskID] = {}

        def on_step(stage: str, done: int, total: int, values: Mapping[str, float]) -> None:
            if stage not in tasks or (bar.tasks[tasks[stage]].finished and done < total):
                tasks[stage] = bar.add_task(stage, total=total)
            bar.values = "  ".join(
                f"{name} {value}" if isinstance(value, int) else f"{name} {value:.4g}" for name, value in values.items()
            )
            bar.update(tasks[stage], completed=done)

        yield on_step


@contextlib.contextmanager
def waiting(message: str, quiet: bool) -> Iterator[None]:
    """A spinner on stderr for a step that cannot say how far it is."""
    if quiet:
        yield
        return
    from rich.console import Console

    with Console(stderr=True).status(message):
        yield


@contextlib.contextmanager
def stdout_to_stderr() -> Iterator[None]:
    """Whatever a library prints goes to stderr; stdout is the command's own."""
    with contextlib.redirect_stdout(sys.stderr):
        yield


def measured(
    measure: Callable[[OnStep], R],
    table: Callable[[R], None],
    as_json: bool,
    quiet: bool,
    beside: Callable[[], Mapping[str, object]] = dict,
) -> None:
    """Measure under a progress bar and show what came out, also where a check at the end has failed.

    Args:
        beside: what --json shows beside the report.

    Raises:
        CheckFailed: the check's, once its report is shown; with --json the command group prints both as one object.
    """
    failed: CheckFailed | None = None
    with stdout_to_stderr(), progress(quiet) as on_step:
        try:
            report = measure(on_step)
        except CheckFailed as error:
            if error.report is None:  # not the one at the end
                raise
            failed, report = error, cast(R, error.report)  # what the measuring would have returned
    if not as_json:
        table(report)
    elif failed is None:
        print_json({**report.as_dict(), **beside()})
    if failed is not None:
        raise failed


def print_json(value: object) -> None:
    """The one object of --json."""
    click.echo(json.dumps(value, ensure_ascii=False))


def size(number_bytes: int) -> str:
    """Bytes as a person reads them (decimal megabytes)."""
    return f"{number_bytes / 1e6:.2f} MB"


def table(title: str, header: list[str], rows: list[list[str]]) -> None:
    """A table on stdout, in full width when it is not a terminal."""
    from rich.console import Console
    from rich.markup import escape
    from rich.table import Table

    from d4c_onnx.untrusted_json import printable

    grid = Table(title=escape(printable(title)), title_justify="left")
    for number, name in enumerate(header):
        grid.add_column(escape(name), justify="left" if number == 0 else "right", no_wrap=number == 0)
    for row in rows:
        grid.add_row(*(escape(printable(cell)) for cell in row))
    width = None if sys.stdout.isatty() else 120
    Console(width=width).print(grid)


def made_for(manifest: Manifest) -> None:
    """Which pixels and which GELU a bundle was made for and who says so, where it is not one that ships."""
    from d4c_onnx.models.preprocessing import described

    if manifest.model.pretrained == "embedded":
        return
    click.echo(f"made for {described(manifest.preprocess, manifest.model)}")
    for one in manifest.model.resampled:
        click.echo(
            f"warning: {one.name} was resampled from {one.stored} positions to {one.taken}, as open_clip does: the "
            "weights are for another image size or text length, and answer less well so (--strict refuses)"
        )


def accuracy_table(accuracy: Accuracy, names: Sequence[str] | None = None) -> None:
    """Zero-shot accuracy or fidelity of several bundles, side by side."""
    rows = accuracy.bundles
    names = names or [row.bundle for row in rows]
    if accuracy.kind == "zero-shot":
        title = f"zero-shot on {accuracy.dataset}, {accuracy.images:,} images, executed by onnxruntime"
        header = ["", "top-1 %", "top-5 %", "difference [95 %]", "agreement %", "cosine image", "cosine text"]
        lines = [
            [name, f"{row.top1:.2f}", f"{row.top5:.2f}", *_versus(row.versus_first)]
            for name, row in zip(names, rows, strict=True)
        ]
    else:
        title = f"fidelity to FP32 on {accuracy.images} held-out images (agreement, not accuracy: no labels)"
        header = ["", "agreement %", "cosine image (least)", "cosine text (least)", "similarity rmse"]
        lines = [[name, *_fidelity(row.versus_first)] for name, row in zip(names, rows, strict=True)]
    table(title, header, lines)


def promise(searched: Promise) -> None:
    """What was promised, every configuration that was tried, and which one was chosen."""
    asked = []
    if searched.target_cosine is not None:
        asked.append(f"cosine >= {searched.target_cosine} on held-out synthetic data")
    if searched.max_drop is not None:
        asked.append(f"top-1 at most {searched.max_drop} points lower")
    header = ["image", "text", "bits a weight", "size", "cosine image", "cosine text", "top-1 lost", ""]
    rows = [
        [
            *(entry.image, entry.text, f"{entry.weight_bits_average:.2f}", size(entry.size_bytes)),
            *(_or_nothing(entry.cosine_image, ".4f"), _or_nothing(entry.cosine_text, ".4f")),
            *(_or_nothing(entry.top1_lost, "+.2f"), "chosen" if entry == searched.chosen else ""),
        ]
        for entry in searched.tries
    ]
    table(f"searched for {' and '.join(asked)}", header, rows)


def _or_nothing(value: float | None, form: str) -> str:
    return "" if value is None else format(value, form)


def _versus(versus: Versus | None) -> list[str]:
    if versus is None or versus.top1_difference is None:
        return ["", "", "", ""]
    change = versus.top1_difference
    return [
        f"{change.points:+.2f} [{change.low:+.2f}, {change.high:+.2f}]",
        f"{versus.agreement:.2f}",
        f"{versus.cosine_image:.5f}",
        f"{versus.cosine_text:.5f}",
    ]


def _fidelity(versus: Versus | None) -> list[str]:
    if versus is None:
        return ["", "", "", ""]
    return [
        f"{versus.agreement:.2f}",
        f"{versus.cosine_image:.5f} ({versus.cosine_image_least:.5f})",
        f"{versus.cosine_text:.5f} ({versus.cosine_text_least:.5f})",
        f"{versus.similarity_rmse:.5f}",
    ]
