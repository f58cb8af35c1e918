"""d4c-onnx quantize."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d4c_onnx.choices import FLOAT16_TARGETS, TARGETS
from d4c_onnx.cli import options, show
from d4c_onnx.cli.effort import Effort, effort_option
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.progress import OnStep

if TYPE_CHECKING:
    from d4c_onnx.foreign import ForeignFiles
    from d4c_onnx.measure import Machine
    from d4c_onnx.pipeline import QuantizeReport
    from d4c_onnx.results import Promise


@click.command("quantize")
@options.model_argument
@options.files_options
@click.option(
    "--bits",
    metavar="wNaM",
    help=f"Weight and activation bits: w4a8, w8a8, w6a6, ...; w4a16 for --target {FLOAT16_TARGETS}.  [recipe: w4a8]",
)
@click.option(
    "--average-bits",
    type=click.FloatRange(4, 8),
    help="Spend so many bits per weight: w4a8, and 8 bits for the layers that measure as most sensitive.",
)
@click.option(
    "--target-cosine",
    type=click.FloatRange(0, 1, min_open=True),
    metavar="COSINE",
    help="Find the smallest files whose towers both keep this mean cosine to FP32 on held-out synthetic data.",
)
@click.option(
    "--max-drop",
    type=click.FloatRange(0),
    metavar="POINTS",
    help="Find the smallest files whose top-1 on --dataset falls by at most so many points.",
)
@options.target_option
@options.pretrained_option
@options.weights_options
@options.output_option
@options.calibrate_options
@effort_option
@click.option("--dataset", help="cifar10, fidelity, or a .parquet file.  [the model's own, else fidelity]")
@options.overwrite_option
@options.recipe_options
@options.machine_options
@options.output_modes
def command(
    model: str,
    files: ForeignFiles | None,
    name: str | None,
    bits: str | None,
    average_bits: float | None,
    target_cosine: float | None,
    max_drop: float | None,
    target: str | None,
    pretrained: str | None,
    model_options: ModelOptions,
    output: Path,
    calibrate: options.Calibrate,
    effort: Effort,
    dataset: str | None,
    overwrite: bool,
    recipe_name: str,
    overrides: tuple[str, ...],
    seed: int | None,
    machine: Machine,
    as_json: bool,
    quiet: bool,
) -> None:
    """Quantise both encoders of MODEL (a name, or an FP32 bundle's path), and measure the files against FP32.

    With --image FILE --text FILE in place of MODEL: a CLIP's ONNX files that others exported. Exports (or imports) and
    synthesises first where it must, and writes into the FP32 bundle. Without --images measuring alone sees real ones.
    """
    source = model if files is None else _alone(files, pretrained, model_options)
    extra: dict[str, object] = {
        "quantization.bits": bits,
        "quantization.average_bits": average_bits,
        "quantization.target_cosine": target_cosine,
        "quantization.max_drop": max_drop,
        "quantization.target": target,
        "evaluation.dataset": dataset,
        **calibrate.keys(),
    }
    effort.refuse(calibrate.calibration)
    recipe = options.resolve_recipe(recipe_name, overrides, seed, extra, effort.keys())
    from d4c_onnx import pipeline

    def quantize(on_step: OnStep) -> QuantizeReport:
        return pipeline.quantize_bundle(
            source,
            recipe,
            output=output,
            pretrained=pretrained,
            options=model_options if files is None else replace(model_options, tokenizer=None),
            name=name,
            prompts=calibrate.prompts,
            texts=calibrate.texts,
            calibration=calibrate.calibration,
            overwrite=overwrite,
            machine=machine,
            on_step=on_step,
            on_ahead=effort.on_ahead,
        )

    show.measured(quantize, _print, as_json, quiet, effort.as_dict)


def _alone(files: ForeignFiles, pretrained: str | None, said: ModelOptions) -> ForeignFiles:
    """The files with their tokenizer; refused beside what is said of models that are named."""
    named = [("MODEL", not options.is_default("model")), ("--pretrained", pretrained is not None)]
    named += [(f"--{name}", bool(getattr(said, name))) for name in ("config", "strict")]
    named += [("--quick-gelu", said.quick_gelu is not None)]
    for option, given in named:
        if given:
            raise click.UsageError(
                f"{option} is about a model that is named, --image and --text name files. Leave it out."
            )
    return replace(files, tokenizer=said.tokenizer)


def _print(report: QuantizeReport | Promise) -> None:
    from d4c_onnx.results import Promise

    if isinstance(report, Promise):  # which no configuration keeps: there is nothing else to show
        show.promise(report)
        return
    if report.promise is not None:
        show.promise(report.promise)
    _print_made(report)


def _print_made(report: QuantizeReport) -> None:
    from d4c_onnx.bundle import open_bundle
    from d4c_onnx.manifest import IMPORTED

    before, after = report.size_bytes.fp32, report.size_bytes.quantized
    names = ["FP32", report.bits.upper()]
    show.accuracy_table(report.accuracy, [*names, "FP16"][: len(report.accuracy.bundles)])
    rows = [
        [tower, show.size(before[tower]), show.size(after[tower]), f"{ratio:.2f}x"]
        for tower, ratio in report.size_ratio.items()
    ]
    show.table("size", ["encoder", *names, "smaller"], rows)
    click.echo(f"{report.weight_bits_average:.2f} bits per MatMul, Gemm and Conv weight, counted from the files")
    if report.accuracy_mode_only:
        click.echo(f"{report.bits} is an accuracy mode: it answers as such a device would, and runs as int8 here")
    if report.target_note != TARGETS["cpu"].note:
        click.echo(f"target {report.target}: {report.target_note}")
    manifest = open_bundle(report.bundle, verify=False).manifest
    used = report.calibrated_with
    no_weights = manifest.model.pretrained == IMPORTED and used.method == "leaves"
    click.echo(
        f"calibrated with {used.images} {used.method} images"
        + (" (imported files have no torch weights to optimise images by)" if no_weights else "")
        + f" and {used.texts} {'texts of your own' if used.own_texts else 'texts of nouns in templates'}"
    )
    show.made_for(manifest)
    spent = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    click.echo(f"{report.bundle} ({spent})")
