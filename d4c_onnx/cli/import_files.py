"""d4c-onnx import."""

from dataclasses import asdict
from pathlib import Path

import click

from d4c_onnx.cli import options, show
from d4c_onnx.manifest import LONGEST_CONTEXT
from d4c_onnx.models.model_options import ModelOptions

_FILE = click.Path(dir_okay=False, path_type=Path)


@click.command("import")
@click.option("--image", type=_FILE, required=True, help="The image tower; or a file with both.")
@click.option("--text", type=_FILE, required=True, help="The text tower; or the same file again.")
@click.option("--image-output", metavar="NAME", help="Its embedding, where the file has several outputs.")
@click.option("--text-output", metavar="NAME", help="Its embedding, where the file has several outputs.")
@click.option("--tokenizer", type=_FILE, help="A tokenizer.json.  [the one beside the text tower]")
@click.option("--context-length", type=click.IntRange(2, LONGEST_CONTEXT), help="Token ids of the longest text.")
@click.option("--pad-token", metavar="TOKEN", help="What fills texts up, where the tower sees it.")
@options.pixels_options
@click.option("--name", help="The model's name.  [that of the folder that both files lie in]")
@options.output_option
@options.overwrite_option
@options.recipe_options
@options.output_modes
def command(
    image: Path,
    text: Path,
    image_output: str | None,
    text_output: str | None,
    tokenizer: Path | None,
    context_length: int | None,
    pad_token: str | None,
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
    d4c-onnx quantize FOLDER.
    """
    recipe = options.resolve_recipe(recipe_name, overrides, seed)
    from d4c_onnx import pipeline
    from d4c_onnx.foreign import ForeignFiles

    files = ForeignFiles(image, text, image_output, text_output, tokenizer, context_length, pad_token)
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
    show.table(f"{image.name}, {text.name} -> {bundle.path}", ["file", "size", "max difference to its file"], rows)
    show.made_for(manifest)
    if manifest.tokenizer.why_fixed:
        click.echo(f"texts are padded to {manifest.tokenizer.context_length} ids: {manifest.tokenizer.why_fixed}")
