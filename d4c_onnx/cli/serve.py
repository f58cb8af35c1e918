"""d4c-onnx serve."""

from __future__ import annotations

from dataclasses import replace
from functools import partial
from pathlib import Path

import click

from d4c_onnx.cli import options, show


@click.command("serve")
@click.argument("bundle", type=click.Path(path_type=Path))
@click.option(
    "--fp32",
    type=click.Path(path_type=Path),
    metavar="BUNDLE",
    help="What BUNDLE was made from: its scores stand beside.",
)
@click.option("--host", default="127.0.0.1", show_default=True, help="Where to listen; 0.0.0.0: to everybody.")
@click.option("--port", type=click.IntRange(0, 65535), default=8000, show_default=True, help="0: any that is free.")
@click.option("--batch", type=click.IntRange(1, 1024), help="Images or texts run together.  [16]")
@click.option("--body-bytes", type=click.IntRange(1), help="Of a request.  [16 MiB]")
@click.option("--pixels", type=click.IntRange(1), help="Of an image as it is stored.  [2^25]")
@click.option("--letters", type=click.IntRange(1), help="Of a text.  [2000]")
@options.provider_option
@options.threads_option
def command(
    bundle: Path,
    fp32: Path | None,
    host: str,
    port: int,
    batch: int | None,
    body_bytes: int | None,
    pixels: int | None,
    letters: int | None,
    provider: str,
    threads: int,
) -> None:
    """Serve BUNDLE over HTTP: /embed/image, /embed/text, /zero-shot, a page at /.

    /openapi.json describes it, /healthz says that it runs, /metrics is for Prometheus. Ends with Ctrl-C.
    """
    from d4c_onnx.extras import need_extra

    need_extra("serve", "serve")
    from d4c_onnx.runtime import ClipSession
    from d4c_onnx.runtime.session import resolve_provider
    from d4c_onnx.serving.app import create_app
    from d4c_onnx.serving.limits import Limits
    from d4c_onnx.serving.listening import listen, serve_forever

    given = {"batch": batch, "body_bytes": body_bytes, "pixels": pixels, "letters": letters}
    limits = replace(Limits(), **{name: value for name, value in given.items() if value is not None})
    listener = listen(host, port)
    with show.stdout_to_stderr():
        running = partial(ClipSession, provider=resolve_provider(provider), threads=threads, most_pixels=limits.pixels)
        served, original = running(bundle), None if fp32 is None else running(fp32)
        app = create_app(served, original, limits)
    address, number = listener.getsockname()[:2]
    shown = f"[{address}]" if ":" in address else address
    click.echo(f"{served.bundle.model_name} at http://{shown}:{number} (Ctrl-C ends it)")
    serve_forever(app, listener, limits)
