"""d4c-onnx benchmark."""

from pathlib import Path

import click

from d4c_onnx.cli import options, show
from d4c_onnx.evaluation.benchmark_report import BatchTiming, BenchmarkReport
from d4c_onnx.manifest import LONGEST_CONTEXT
from d4c_onnx.untrusted_json import quoted

_LARGEST_BATCH = 4096  # as evaluation.batch


@click.command("benchmark")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--batches", default="1,8,16,32", show_default=True, help="Batch sizes.")
@click.option(
    "--sequence", type=click.IntRange(2, LONGEST_CONTEXT), default=16, show_default=True, help="Token ids per text."
)
@click.option(
    "--rounds", type=click.IntRange(1, 1_000_000), default=15, show_default=True, help="Timed runs at each batch size."
)
@click.option("--peers", is_flag=True, help="Build onnxruntime's own quantisations of the first bundle and race them.")
@click.option(
    "--picture", type=click.Path(path_type=Path, dir_okay=False), help="Draw the speed-ups into a .png or .svg file."
)
@options.provider_option
@options.threads_option
@options.output_modes
def command(
    bundles: tuple[Path, ...],
    batches: str,
    sequence: int,
    rounds: int,
    peers: bool,
    picture: Path | None,
    provider: str,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Time BUNDLES side by side, the first being the baseline: interleaved medians, size, load time, memory."""
    try:
        sizes = [int(part) for part in batches.split(",")]
    except ValueError:
        sizes = []
    if not sizes or min(sizes) < 1 or max(sizes) > _LARGEST_BATCH:
        raise click.BadParameter(
            f"{quoted(batches)} is not a list of sizes such as 1,8,16, up to {_LARGEST_BATCH}", param_hint="--batches"
        )
    from d4c_onnx import measure

    with show.stdout_to_stderr(), show.progress(quiet) as on_step:
        report = measure.benchmark_bundles(
            list(bundles),
            batches=sizes,
            sequence=sequence,
            rounds=rounds,
            peers=peers,
            picture=picture,
            machine=measure.Machine(provider=provider, threads=threads),
            on_step=on_step,
        )
    if as_json:
        show.print_json(report.as_dict())
        return
    show_report(report, sizes)


def show_report(report: BenchmarkReport, sizes: list[int]) -> None:
    """Two tables a tower, loading and speed, and what could not be measured."""
    memory = {"RAM MB": "loaded_bytes", "in use MB": "held_bytes", "peak MB": "peak_bytes"}
    gpu = ""
    if report.machine.gpu:
        memory["GPU MB"] = "gpu_bytes"
        gpu = ", GPU: what it took there by then"
    for tower, rows in report.towers.items():
        show.table(
            f"{tower}: loading, each in a process of its own; RAM: what loading adds, in use: what of it is held, "
            f"peak: of the process after batches of {min(sizes)} and {max(sizes)}{gpu}",
            ["", "MB", "load ms", "first ms", *memory],
            [
                [
                    row.name,
                    f"{row.size_bytes / 1e6:.1f}",
                    f"{row.loading.load_ms:.0f}",
                    f"{row.loading.first_ms:.0f}",
                    *(_megabytes(getattr(row.loading, key)) for key in memory.values()),
                ]
                for row in rows
            ],
        )
        noun = "images" if tower == "image" else "texts"
        show.table(
            f"{tower}: {report.machine.title}; medians of {report.rounds} interleaved runs [quartiles], "
            f"ms, speed-up, {noun} per second",
            ["", *(f"batch {size}" for size in sizes)],
            [[row.name, *(_cell(row.batches[size]) for size in sizes)] for row in rows],
        )
    for failure in report.failed:
        click.echo(f"{failure.name}, {failure.tower}: not measured ({failure.reason})")


def _cell(found: BatchTiming) -> str:
    digits = 1 if found.median_ms >= 10 else 2
    median, low, high = (f"{value:.{digits}f}" for value in (found.median_ms, found.low_ms, found.high_ms))
    return f"{median} [{low}, {high}] {found.speed_up:.2f}x {found.per_second:.0f}/s"


def _megabytes(value: float | None) -> str:
    return "-" if value is None else f"{value / 1e6:.0f}"
