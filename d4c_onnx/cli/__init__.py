"""The command line: one file per command; parse, one library call, show. Nothing here imports torch."""

from d4c_onnx.cli.main import main

__all__ = ["main"]
