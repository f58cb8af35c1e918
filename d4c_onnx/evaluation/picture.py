"""A benchmark as a picture: speed-up over the baseline, per tower and batch size."""

from pathlib import Path

from d4c_onnx.errors import D4CError
from d4c_onnx.evaluation.benchmark_report import BenchmarkReport


def check_picture(path: Path) -> None:
    """Refuse a picture that could not be written, before anything is measured for it.

    Raises:
        D4CError: matplotlib is not installed or knows no such ending, or the folder is not there.
    """
    try:
        from matplotlib.backends.backend_agg import FigureCanvasAgg
    except ImportError as error:
        raise D4CError(
            f"{path}: a picture needs matplotlib. Install it with pip install 'd4c-onnx[benchmarks]'."
        ) from error
    if path.suffix.removeprefix(".") not in FigureCanvasAgg.get_supported_filetypes():
        raise D4CError(f"{path}: no picture has such an ending. Use a .png or .svg name.")
    if not path.parent.is_dir():
        raise D4CError(f"{path}: there is no folder {path.parent}. Make it first.")


def draw_benchmark(report: BenchmarkReport, path: Path) -> None:
    """Write bars for what `measure.benchmark_bundles` returned; the format follows the file's ending.

    Raises:
        D4CError: as `check_picture`, or the disk is full.
    """
    check_picture(path)
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    towers = report.towers
    figure = Figure(figsize=(7.5 * len(towers), 5), layout="constrained")
    FigureCanvasAgg(figure)
    axes = figure.subplots(1, len(towers), squeeze=False)[0]
    for panel, (tower, rows) in zip(axes, towers.items(), strict=True):
        sizes = list(rows[0].batches)
        width = 0.8 / len(rows)
        for number, row in enumerate(rows):
            places = [position + (number - (len(rows) - 1) / 2) * width for position in range(len(sizes))]
            heights = [row.batches[size].speed_up for size in sizes]
            drawn = panel.bar(places, heights, width, label=f"{row.name}, {row.size_bytes / 1e6:.0f} MB")
            panel.bar_label(drawn, fmt="%.2f", fontsize=6, rotation=90, padding=2)
        panel.set_xticks(range(len(sizes)), [f"batch {size}" for size in sizes])
        panel.set(title=f"{tower} encoder", ylabel=f"times as fast as {rows[0].name}")
        panel.margins(y=0.15)
        panel.legend(fontsize=7, ncols=3, loc="upper center", bbox_to_anchor=(0.5, -0.06))  # no bar hides behind it
    figure.suptitle(f"{report.machine.title}, medians of {report.rounds} interleaved runs", fontsize=9)
    try:
        figure.savefig(path, dpi=110)
    except (OSError, ValueError) as error:
        raise D4CError(f"{path}: the picture cannot be written ({error}). Use a .png or .svg name.") from error
