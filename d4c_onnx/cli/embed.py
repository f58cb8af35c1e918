"""d4c-onnx embed."""

from __future__ import annotations

from pathlib import Path

import click

from d4c_onnx.cli import options, show


@click.command("embed")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.argument("source", type=click.Path(path_type=Path))
@click.option(
    "-o", "--output", type=click.Path(path_type=Path), required=True, metavar="FILE", help="A .npy or .parquet file."
)
@click.option("--batch", type=click.IntRange(1, 4096), default=32, show_default=True, help="Items run together.")
@options.overwrite_option
@options.provider_option
@options.threads_option
@options.output_modes
def command(
    bundle: Path,
    source: Path,
    output: Path,
    batch: int,
    overwrite: bool,
    provider: str,
    threads: int,
    as_json: bool,
    quiet: bool,
) -> None:
    """Embed SOURCE with BUNDLE: a folder or a tar of images, or a text file with one text a line.

    Names stand beside the vectors; broken files are left out and listed. An interrupted run goes on where it was.
    """
    from d4c_onnx.embedding import embed_source
    from d4c_onnx.runtime.session import resolve_provider

    with show.stdout_to_stderr(), show.progress(quiet) as on_step:
        report = embed_source(
            bundle,
            source,
            output,
            provider=resolve_provider(provider),
            threads=threads,
            batch=batch,
            overwrite=overwrite,
            on_step=on_step,
        )
    if as_json:
        show.print_json(report.as_dict())
        return
    click.echo(f"{report.vectors:,} vectors of {report.width} numbers in {report.output}, names in {report.names}")
    if report.broken_list is not None:
        click.echo(f"{report.broken:,} could not be read, all listed in {report.broken_list}:")
        for name, reason in report.first_broken:
            click.echo(f"  {name[:100]!r}: {reason[:200]}")
