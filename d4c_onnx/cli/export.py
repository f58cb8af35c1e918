"""d4c-onnx export."""

from dataclasses import asdict
from pathlib import Path

import click

from d4c_onnx.cli import options, show
from d4c_onnx.models.model_options import ModelOptions


@click.command("export")
@options.model_argument
@options.pretrained_option
@options.weights_options
@options.output_option
@click.option("--raw", is_flag=True, help="Leave the embeddings unnormalised.")
@options.overwrite_option
@options.recipe_options
@options.threads_option
@options.output_modes
def command(
    model: str,
    pretrained: str | None,
    model_options: ModelOptions,
    output: Path,
    raw: bool,
    overwrite: bool,
    recipe_name: str,
    overrides: tuple[str, ...],
    seed: int | None,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn MODEL into FP32 ONNX image and text encoders, checked against torch.

    MODEL is an embedded mini (the default), an open_clip architecture, or hf-hub:org/repo.
    """
    recipe = options.resolve_recipe(recipe_name, overrides, seed)
    from d4c_onnx import measure, pipeline

    with show.stdout_to_stderr(), show.progress(quiet) as on_step:
        machine = measure.Machine(threads=threads)
        bundle = pipeline.export_bundle(
            model,
            output,
            recipe,
            pretrained=pretrained,
            options=model_options,
            raw=raw,
            overwrite=overwrite,
            machine=machine,
            on_step=on_step,
        )
    from d4c_onnx.bundle import encoder_size_bytes

    sizes, parity = encoder_size_bytes(bundle), bundle.manifest.parity_max_abs_difference or {}
    if as_json:
        show.print_json(
            {
                "model": model,
                "pretrained": bundle.manifest.model.pretrained,
                "bundle": str(bundle.path),
                "size_bytes": sizes,
                "parity_max_abs_difference": dict(parity),
                "preprocess": asdict(bundle.manifest.preprocess),
                "quick_gelu": bundle.manifest.model.quick_gelu,
                "sources": dict(bundle.manifest.model.sources),
                "resampled": [asdict(entry) for entry in bundle.manifest.model.resampled],
                "io": {name: asdict(entry) for name, entry in bundle.manifest.io.items()},
            }
        )
        return
    rows = [[path.name, show.size(sizes[tower]), f"{parity[tower]:.1e}"] for tower, path in bundle.encoders.items()]
    show.table(f"{model} -> {bundle.path}", ["file", "size", "max difference to torch"], rows)
    show.made_for(bundle.manifest)
