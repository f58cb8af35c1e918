"""d4c-onnx recipe."""

import click

from d4c_onnx.cli import options, show


@click.command("recipe")
@click.argument("pattern", default="")
@options.output_modes
def command(pattern: str, as_json: bool, quiet: bool) -> None:
    """Print every recipe key with its default and what it does; PATTERN keeps keys that contain it."""
    from d4c_onnx.recipe_keys import recipe_keys

    keys = [key for key in recipe_keys() if pattern.lower() in key.name.lower()]
    if as_json:
        found = [{"key": key.name, "default": key.default, "takes": key.takes, "help": key.help} for key in keys]
        show.print_json({"keys": found})
        return
    for key in keys:
        click.echo(f"{key.name} = {key.shown_default}    ({key.takes})")
        if not quiet:
            click.echo(f"    {key.help}")
