"""Environments of real clients: made once, with pip and npm, in `$D4C_CLIENTS` (by default in the user's cache)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

PYTHON = {
    "fastembed": ["fastembed==0.9.1"],
    "openvino": ["openvino==2026.4.1", "numpy"],
    "optimum": ["optimum-onnx[onnxruntime]==0.1.0", "torch"],
    "triton": ["tritonclient[grpc]"],
}
NODE = {
    "transformersjs": ["@huggingface/transformers@4.3.2"],
    "page": ["@huggingface/tokenizers@0.2.0", "onnxruntime-web@1.30.0", "playwright-core@1.65.1"],
}


def environment(client: str) -> Path:
    """The folder of a client's environment, made where there is none; skips where it cannot be made."""
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    folder = Path(os.environ.get("D4C_CLIENTS", f"{cache}/d4c-onnx/clients")) / client
    ready = folder / "ready"
    if ready.exists():
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if client in NODE:
        if shutil.which("npm") is None:
            pytest.skip("no npm here")
        commands = [["npm", "init", "-y"], ["npm", "install", "--ignore-scripts", *NODE[client]]]
    else:
        python = str(folder / "bin" / "python")
        commands = [[sys.executable, "-m", "venv", str(folder)], [python, "-m", "pip", "install", *PYTHON[client]]]
    for command in commands:
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False)
        if done.returncode:
            pytest.skip(f"{client} cannot be installed here: {done.stderr.strip()[-200:]}")
    ready.touch()
    return folder
