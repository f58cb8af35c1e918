"""The click group: loads a command's file when it is called, and turns errors into exit codes.

0 done, 1 a requested check failed (or the run was interrupted), 2 bad input or usage.
"""

import contextlib
import errno
import importlib
import io
import json
import os
import signal
import sys
from types import FrameType
from typing import Any

import click

import d4c_onnx
from d4c_onnx.errors import CheckFailed, D4CError, Report
from d4c_onnx.untrusted_json import printable

COMMANDS = {
    "export": "Turn a CLIP model into FP32 ONNX encoders, checked against torch.",
    "import": "Turn ONNX files that others exported into FP32 encoders, checked against them.",
    "synthesize": "Make a calibration set from the model itself.",
    "quantize": "Quantise both encoders, and measure the files against FP32.",
    "package": "Write a bundle as a serving stack wants it.",
    "serve": "Serve a bundle over HTTP, with a page.",
    "evaluate": "Measure bundles side by side on a labelled set.",
    "benchmark": "Time bundles side by side on this machine.",
    "embed": "Turn images or texts into vectors, in one file.",
    "verify": "Check a bundle, or a client, by its golden vectors.",
    "inspect": "Show each layer's true bits, ranges and the kernel that runs it.",
    "models": "List what can be loaded.",
    "recipe": "Print every recipe key with its default and what it does.",
}

# a module cannot be called so
_FILES = {"import": "import_files"}


class LazyGroup(click.Group):
    """Commands by name; their files are imported when they run, so that --help stays fast."""

    def list_commands(self, ctx: click.Context) -> list[str]:
        return list(COMMANDS)

    def get_command(self, ctx: click.Context, cmd_name: str) -> click.Command | None:
        if cmd_name not in COMMANDS:
            return None
        command: click.Command = importlib.import_module(f"d4c_onnx.cli.{_FILES.get(cmd_name, cmd_name)}").command
        return command

    def format_commands(self, ctx: click.Context, formatter: click.HelpFormatter) -> None:
        with formatter.section("Commands"):
            formatter.write_dl(list(COMMANDS.items()))

    def invoke(self, ctx: click.Context) -> Any:
        try:
            return super().invoke(ctx)
        except CheckFailed as error:
            _fail("check failed", error, error.report)
            ctx.exit(1)
        except D4CError as error:
            _fail("error", error)
            ctx.exit(2)
        except click.UsageError as error:
            if _wants_json():
                click.echo(json.dumps({"error": error.format_message(), "type": type(error).__name__}))
            raise
        except OSError as error:  # a path that cannot be looked at, a full disk
            if error.errno == errno.EPIPE:  # the reader went away: click ends quietly
                raise
            place = f"{error.filename}: " if error.filename else ""
            reason = error.strerror or str(error)
            _fail("error", D4CError(f"{place}{reason}. Check the path, its permissions, and the room on the disk."))
            ctx.exit(2)


@click.group(cls=LazyGroup, context_settings={"help_option_names": ["-h", "--help"]})
@click.version_option(d4c_onnx.__version__)
def group() -> None:
    """Data-free quantisation of CLIP models into small, fast ONNX encoders."""


def main() -> None:
    """The console script."""
    _open_streams()
    signal.signal(signal.SIGTERM, _interrupt)
    try:
        group(prog_name="d4c-onnx")
    finally:
        _drop_unwritten()


def _open_streams() -> None:
    """What a terminal cannot show is escaped; a closed stream is nowhere, and not the next file that is opened."""
    for descriptor, name in enumerate(("stdin", "stdout", "stderr")):
        try:
            os.fstat(descriptor)
        except OSError:
            os.open(os.devnull, os.O_RDWR)  # takes the lowest number that is free: this one
        if getattr(sys, name) is None:
            setattr(sys, name, os.fdopen(descriptor, "w" if descriptor else "r", closefd=False))
    for stream in (sys.stdout, sys.stderr):
        if isinstance(stream, io.TextIOWrapper):
            stream.reconfigure(errors="backslashreplace")


def _drop_unwritten() -> None:
    """What found no room was told already; Python would tell it again when it ends, with another exit code."""
    for stream in (sys.stdout, sys.stderr):
        try:
            stream.flush()
        except (OSError, ValueError):
            with contextlib.suppress(OSError, ValueError):
                os.dup2(os.open(os.devnull, os.O_WRONLY), stream.fileno())


def _interrupt(number: int, frame: FrameType | None) -> None:
    raise KeyboardInterrupt


def _wants_json() -> bool:
    return "--json" in sys.argv[1:]


def _fail(kind: str, error: D4CError, report: Report | None = None) -> None:
    if _wants_json():
        measured = {} if report is None else {"report": report.as_dict()}
        with contextlib.suppress(OSError):  # the full disk may be what is told
            click.echo(json.dumps({"error": str(error), "type": type(error).__name__, **measured}))
    with contextlib.suppress(OSError):
        click.echo(f"{kind}: {printable(str(error))}", err=True)
