"""d4c-onnx evaluate."""

from pathlib import Path

import click

from d4c_onnx.cli import options, show
from d4c_onnx.progress import OnStep
from d4c_onnx.results import Accuracy


@click.command("evaluate")
@click.argument("bundles", nargs=-1, required=True, type=click.Path(path_type=Path))
@click.option("--dataset", help="cifar10, fidelity, or a .parquet file.  [the model's own]")
@options.calibration_option
@options.exif_option
@options.recipe_options
@options.provider_option
@options.threads_option
@options.output_modes
def command(
    bundles: tuple[Path, ...],
    dataset: str | None,
    calibration: Path | None,
    exif_rotation: bool | None,
    recipe_name: str,
    overrides: tuple[str, ...],
    seed: int | None,
    provider: str,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Measure BUNDLES side by side, the first being the baseline.

    Zero-shot on a labelled set; with --dataset fidelity and --calibration DIR, agreement on held-out synthetic input.
    """
    extra: dict[str, object] = {"evaluation.dataset": dataset, "evaluation.exif_rotation": exif_rotation}
    recipe = options.resolve_recipe(recipe_name, overrides, seed, extra)
    from d4c_onnx import measure

    machine = measure.Machine(provider=provider, threads=threads)

    def evaluate(on_step: OnStep) -> Accuracy:
        return measure.evaluate_bundles(
            list(bundles), recipe, calibration=calibration, machine=machine, on_step=on_step
        )

    show.measured(evaluate, show.accuracy_table, as_json, quiet)
