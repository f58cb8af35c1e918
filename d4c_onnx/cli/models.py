"""d4c-onnx models."""

import click

from d4c_onnx.cli import options, show


@click.command("models")
@click.argument("pattern", default="")
@options.output_modes
def command(pattern: str, as_json: bool, quiet: bool) -> None:
    """List what can be loaded; PATTERN keeps names that contain it."""
    from d4c_onnx.models.catalogue import embedded_models, registry_models

    shipped = {name: entry for name, entry in embedded_models().items() if pattern.lower() in name.lower()}
    with show.stdout_to_stderr(), show.waiting("reading open_clip's registry", quiet or as_json):
        registry = {name: tags for name, tags in registry_models().items() if pattern.lower() in name.lower()}
    if as_json:
        described = {
            name: {"description": entry.description, "dataset": entry.dataset} for name, entry in shipped.items()
        }
        show.print_json({"embedded": described, "open_clip": registry})
        return
    for name, entry in shipped.items():
        click.echo(f"{name:<32} embedded: {entry.description}")
    for name, tags in registry.items():
        click.echo(f"{name:<32} {', '.join(tags) or '(no published weights: --pretrained FILE or random)'}")
    click.echo("hf-hub:ORG/REPO                  any open_clip model on the Hugging Face hub")
