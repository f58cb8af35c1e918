"""d4c-onnx verify."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

import click

from d4c_onnx.cli import options, show

if TYPE_CHECKING:
    from d4c_onnx.runtime.verify import Verification

_ARRAY = click.Path(exists=True, dir_okay=False, path_type=Path)
_MARK = {True: "ok", False: "FAILED", None: "note"}


@click.command("verify")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option("--images", type=_ARRAY, metavar="FILE.npy", help="What your client gives for the golden images.")
@click.option("--texts", type=_ARRAY, metavar="FILE.npy", help="What your client gives for the golden texts.")
@options.provider_option
@options.threads_option
@options.output_modes
def command(
    bundle: Path, images: Path | None, texts: Path | None, provider: str, threads: int, as_json: bool, quiet: bool
) -> None:
    """Check BUNDLE: hashes, inputs and outputs, golden input to golden output, with onnxruntime alone.

    BUNDLE may be a package, too (d4c-onnx package): each of its files is run, and its configs are looked at.

    With --images or --texts (a row for each entry of golden/golden.json) your client is checked, too. Where golden
    vectors do not come out, the likeliest mistake is named.
    """
    from d4c_onnx.errors import CheckFailed
    from d4c_onnx.packaging import is_package, verify_package
    from d4c_onnx.runtime.session import resolve_provider
    from d4c_onnx.runtime.verify import read_answers, verify_bundle

    with show.stdout_to_stderr(), show.waiting("running both encoders", quiet or as_json):
        answers = read_answers(images, texts)
        check = verify_package if is_package(bundle) else verify_bundle
        found = check(bundle, answers, provider=resolve_provider(provider), threads=threads)
    if not found.ok:
        if not as_json:
            _print(found)
        raise CheckFailed(f"{bundle}: {_failed(found)}", found)
    if as_json:
        show.print_json(found.as_dict())
        return
    _print(found)


def _failed(found: Verification) -> str:
    names = ", ".join(check.name for check in found.checks if check.ok is False)
    mistakes = [f"likeliest for {tower}s: {name}" for tower, name in found.likeliest.items() if name]
    return f"{'; '.join([f'{names} not as they must be', *mistakes])}."


def _print(found: Verification) -> None:
    wide = max(len(check.name) for check in found.checks)
    for check in found.checks:
        click.echo(f"{_MARK[check.ok]:<7} {check.name:<{wide}} {check.detail}")
