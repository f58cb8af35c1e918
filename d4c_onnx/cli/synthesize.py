"""d4c-onnx synthesize."""

from __future__ import annotations

import time
from pathlib import Path
from typing import TYPE_CHECKING, get_args

import click

from d4c_onnx.choices import SynthesisMethod
from d4c_onnx.cli import options, show
from d4c_onnx.cli.effort import Effort, effort_option
from d4c_onnx.models.model_options import ModelOptions

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet


@click.command("synthesize")
@options.model_argument
@options.pretrained_option
@options.weights_options
@options.output_option
@options.prompts_option
@options.texts_option
@click.option(
    "--method",
    type=click.Choice(get_args(SynthesisMethod)),
    help="How images come into being; noise, pink, leaves and real ask no model.  [recipe: d4c]",
)
@click.option(
    "--source",
    type=click.Path(exists=True, path_type=str),
    help="With --method real: a folder of images, or a .parquet file.",
)
@options.exif_option
@effort_option
@click.option("--images", type=click.IntRange(1), help="Number of calibration images.  [recipe: 64]")
@click.option("--report", is_flag=True, help="Also write one HTML page: images, losses, ranges and ranks per layer.")
@click.option(
    "--against",
    multiple=True,
    type=click.Path(exists=True, file_okay=False, path_type=Path),
    help="With --report: another calibration set to show beside it, real images for example.",
)
@options.recipe_options
@options.device_option
@options.threads_option
@options.output_modes
def command(
    model: str,
    pretrained: str | None,
    model_options: ModelOptions,
    output: Path,
    prompts: Path | None,
    texts: Path | None,
    method: str | None,
    source: str | None,
    exif_rotation: bool | None,
    effort: Effort,
    images: int | None,
    report: bool,
    against: tuple[Path, ...],
    recipe_name: str,
    overrides: tuple[str, ...],
    seed: int | None,
    device: str,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Make a calibration set from MODEL (a name, or the path of an FP32 bundle) itself.

    No real image is touched, unless --method real asks for that control.

    An interrupted run resumes; the same seed gives the same files. Several processes share the work when torch's
    launcher starts them: torchrun --no-python --nproc-per-node 2 d4c-onnx synthesize ...
    """
    if against and not report:
        raise click.UsageError("--against belongs to --report.")
    extra: dict[str, object] = {"synthesis.method": method, "synthesis.source": source, "synthesis.images": images}
    extra["evaluation.exif_rotation"] = exif_rotation
    recipe = options.resolve_recipe(recipe_name, overrides, seed, extra, effort.keys())
    from d4c_onnx import measure, pipeline

    start = time.perf_counter()
    machine = measure.Machine("auto", device, threads, *options.launched())
    first = machine.rank == 0  # of several processes, one speaks
    with show.stdout_to_stderr(), show.progress(quiet or not first) as on_step:
        folder, made = pipeline.synthesize_calibration_set(
            model,
            recipe,
            output=output,
            pretrained=pretrained,
            options=model_options,
            prompts=prompts,
            texts=texts,
            machine=machine,
            on_step=on_step,
            on_ahead=effort.on_ahead if first else None,
        )
        page = measure.report_calibration_set(folder, against=against, on_step=on_step) if report and first else None
    if not first:
        return
    seconds = round(time.perf_counter() - start, 2)
    if as_json:
        show.print_json({"model": model, **_as_dict(folder, made, page), "seconds": seconds, **effort.as_dict()})
    else:
        _print(folder, made, page, seconds)


def _as_dict(folder: Path, made: CalibrationSet, page: Path | None) -> dict[str, object]:
    return {
        "calibration": str(folder),
        "images": len(made.pixel_values),
        "held_out": len(made.held_out),
        "prompts": len(made.texts),
        "contact_sheet": str(_contact_sheet(folder)),
        "report": str(page) if page else None,
    }


def _print(folder: Path, made: CalibrationSet, page: Path | None, seconds: float) -> None:
    from d4c_onnx.bundle import open_bundle

    click.echo(f"{len(made.pixel_values)} images and {len(made.texts)} prompts in {folder} ({seconds:.0f} s)")
    show.made_for(open_bundle(folder.parent, verify=False).manifest)
    click.echo(f"look at {page or _contact_sheet(folder)}")


def _contact_sheet(folder: Path) -> Path:
    return folder / "contact_sheet.png"
