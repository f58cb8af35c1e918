"""Environments of real clients: made once, with pip and npm, in `$D4C_CLIENTS` (by default in the user's cache)."""

import os
import shutil
import subprocess
import sys
from pathlib import Path

import pytest

import d4c_onnx

PYTHON = {
    "fastembed": ["fastembed==0.9.1", "qdrant-client==1.20.0"],
    "openvino": ["openvino==2026.4.1", "numpy"],
    "optimum": ["optimum-onnx[onnxruntime]==0.1.0"],
    "rclip": ["rclip==3.3.0"],
    "triton": ["tritonclient[grpc,http]==2.73.0", "nvidia-pytriton==0.7.0"],
    "txtai": ["txtai==9.14.0"],
}
NODE = {
    "node": ["@huggingface/transformers@4.3.2", "onnxruntime-web@1.30.0", "playwright-core@1.65.1"],
    "page": ["@huggingface/tokenizers@0.2.0", "onnxruntime-web@1.30.0", "playwright-core@1.65.1"],
}
# These need torch, which takes gigabytes, or d4c_onnx itself: they see those of the environment in which the tests run.
SHARING = ("optimum", "txtai", "triton")
INSTALLING = 600  # seconds, after which a registry is called out of reach


def chromium() -> str:
    """The browser of this machine; skips where there is none."""
    found = next(filter(None, map(shutil.which, ("chromium", "chromium-browser", "google-chrome"))), None)
    if found is None:
        pytest.skip("no Chromium here (apt install chromium)")
    return found


def environment(name: str) -> Path:
    """The folder of an environment, made where there is none of these packages; skips where it cannot be made."""
    cache = os.environ.get("XDG_CACHE_HOME", str(Path.home() / ".cache"))
    folder = Path(os.environ.get("D4C_CLIENTS", f"{cache}/d4c-onnx/clients")) / name
    ready, wanted = folder / "ready", "\n".join(PYTHON.get(name) or NODE[name])
    if ready.exists() and ready.read_text() == wanted:
        return folder
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    if name in NODE:
        if shutil.which("npm") is None:
            pytest.skip("no npm here")
        _install(name, folder, [["npm", "init", "-y"], ["npm", "install", "--ignore-scripts", *NODE[name]]])
    else:
        _install(name, folder, [[sys.executable, "-m", "venv", str(folder)]])
        if name in SHARING:
            [site] = folder.glob("lib/python*/site-packages")
            shared = [path for path in sys.path if path.endswith("site-packages")]
            (site / "zz-shared.pth").write_text("\n".join([*shared, str(Path(d4c_onnx.__file__).parents[1])]))
        _install(name, folder, [[str(folder / "bin" / "python"), "-m", "pip", "install", *PYTHON[name]]])
    ready.write_text(wanted)
    return folder


def _install(name: str, folder: Path, commands: list[list[str]]) -> None:
    for command in commands:
        try:
            done = subprocess.run(command, cwd=folder, capture_output=True, text=True, check=False, timeout=INSTALLING)
        except subprocess.TimeoutExpired:
            pytest.skip(f"{name} was not installed within {INSTALLING} seconds")
        if done.returncode:
            pytest.skip(f"{name} cannot be installed here: {done.stderr.strip()[-200:]}")
