"""d4c-onnx package."""

from pathlib import Path

import click

from d4c_onnx.cli import options, show


@click.command("package")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--target",
    required=True,
    metavar="STACK",
    help="transformersjs, immich, fastembed (txtai, too), triton, optimum, openvino, librephotos, rclip, frigate, "
    "vespa, onnxruntime (alone, with examples), or web (a page that runs in the browser).",
)
@click.option("-o", "--output", type=click.Path(path_type=Path), required=True, help="The package's folder.")
@click.option("--name", help="The model's name, for stacks that know models by name.  [the bundle's]")
@options.overwrite_option
@options.output_modes
def command(
    bundle: Path, target: str, output: Path, name: str | None, overwrite: bool, as_json: bool, quiet: bool
) -> None:
    """Write BUNDLE as a serving stack wants it: other names and folders, the same numbers."""
    from d4c_onnx.packaging import package_bundle

    with show.stdout_to_stderr(), show.progress(quiet) as on_step:
        report = package_bundle(bundle, target, output, name=name, overwrite=overwrite, on_step=on_step)
    if as_json:
        show.print_json(report.as_dict())
        return
    sizes = {file: entry.size_bytes for file, entry in report.content.files.items()}
    rows = [
        [model.file, show.size(sizes[model.file]), "; ".join(model.edits) or "as it is"]
        for model in report.content.models
    ]
    show.table(f"{bundle} -> {report.path}", ["file", "size", "changed at its boundary"], rows)
    click.echo(f"answers are the bundle's, bit by bit; {len(sizes)} files")
    for remark in report.content.remarks:
        click.echo(f"note: {remark}")
    click.echo(f"use: {report.content.use}")
