"""d4c-onnx import."""

from __future__ import annotations

import functools
from dataclasses import asdict, replace
from pathlib import Path
from typing import TYPE_CHECKING

import click

from d4c_onnx.cli import options, show
from d4c_onnx.models.model_options import ModelOptions

if TYPE_CHECKING:
    from d4c_onnx.foreign import ForeignFiles


@click.command("import")
@functools.partial(options.files_options, required=True)
@click.option(
    "--tokenizer",
    type=click.Path(dir_okay=False, path_type=Path),
    help="A tokenizer.json.  [the one beside the text tower]",
)
@options.pixels_options
@options.output_option
@options.overwrite_option
@options.recipe_options
@options.output_modes
def command(
    files: ForeignFiles,
    tokenizer: Path | None,
    model_options: ModelOptions,
    name: str | None,
    output: Path,
    overwrite: bool,
    recipe_name: str,
    overrides: tuple[str, ...],
    seed: int | None,
    as_json: bool,
    quiet: bool,
) -> None:
    """Turn the ONNX files of a CLIP that others exported into an FP32 bundle, checked against the files.

    Tokenizer and preprocessing are taken from configs beside the files, or from options. Quantise the bundle with
    d4c-onnx quantize FOLDER; or do both at once: d4c-onnx quantize --image FILE --text FILE.
    """
    recipe = options.resolve_recipe(recipe_name, overrides, seed)
    from d4c_onnx import pipeline

    files = replace(files, tokenizer=tokenizer)
    with show.stdout_to_stderr(), show.progress(quiet) as on_step:
        bundle = pipeline.import_bundle(
            files, output, recipe, name=name, options=model_options, overwrite=overwrite, on_step=on_step
        )
    from d4c_onnx.bundle import encoder_size_bytes

    sizes, manifest = encoder_size_bytes(bundle), bundle.manifest
    parity = manifest.parity_max_abs_difference or {}
    if as_json:
        show.print_json(
            {
                "model": bundle.model_name,
                "bundle": str(bundle.path),
                "size_bytes": sizes,
                "parity_max_abs_difference": dict(parity),
                "preprocess": asdict(manifest.preprocess),
                "tokenizer": manifest.tokenizer.as_dict(),
                "quick_gelu": manifest.model.quick_gelu,
                "sources": dict(manifest.model.sources),
                "io": {name: asdict(entry) for name, entry in manifest.io.items()},
            }
        )
        return
    rows = [[path.name, show.size(sizes[tower]), f"{parity[tower]:.1e}"] for tower, path in bundle.encoders.items()]
    show.table(
        f"{files.image.name}, {files.text.name} -> {bundle.path}", ["file", "size", "max difference to its file"], rows
    )
    show.made_for(manifest)
    if manifest.tokenizer.why_fixed:
        click.echo(f"texts are padded to {manifest.tokenizer.context_length} ids: {manifest.tokenizer.why_fixed}")
