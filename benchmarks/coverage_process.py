"""A process for each config, forked from one that has loaded torch, open_clip and onnxruntime but once."""

import importlib
import multiprocessing
import os
import resource
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

# Loading these takes as long as a small config's quantisation.
_PRELOADED = ("torch.onnx", "open_clip", "timm", "transformers", "onnxscript", "onnxruntime.quantization")


@dataclass(frozen=True, slots=True)
class Forked:
    """Where processes come from.

    Attributes:
        limit: bytes of memory that a process may ask for.
        seconds: the most that one may take.
    """

    limit: int
    seconds: float

    def run(self, folder: Path, given: Mapping[str, Any]) -> str:
        """`coverage_config.run(**given)`, its stderr in `folder`: why it was not finished, or nothing."""
        errors = folder / "stderr.txt"
        context = multiprocessing.get_context("forkserver")
        context.set_forkserver_preload(list(_PRELOADED))
        process = context.Process(target=_run, args=(errors, self.limit, dict(given)))
        process.start()
        process.join(self.seconds)
        if process.is_alive():
            process.kill()
            process.join()
            return f"stopped after {self.seconds / 60:g} minutes"
        if process.exitcode:
            lines = errors.read_text("utf-8", "replace").strip().splitlines() if errors.exists() else []
            return f"ended with {process.exitcode}: {(lines or [''])[-1]}"
        return ""


def _run(errors: Path, limit: int, given: dict[str, Any]) -> None:
    """What the process does, with nothing of it on the terminal."""
    os.dup2(os.open(errors, os.O_WRONLY | os.O_CREAT), 2)
    resource.setrlimit(resource.RLIMIT_DATA, (limit, limit))
    importlib.import_module("coverage_config").run(**given)
