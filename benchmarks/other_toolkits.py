"""Our encoders beside what other toolkits make of the same FP32 files, timed side by side in one run.

    python benchmarks/other_toolkits.py exported/ViT-B-32 exported/ViT-B-32/w4a8 exported/ViT-B-32/w8a8 --batches 1,16

Each toolkit gets an environment of its own, installed with pip, and quantises both encoders: optimum-onnx by its
command line (dynamic int8), AMD Quark statically at A8W8 on noise. What does not install or refuses a file is named
with the reason. Prints Markdown.
"""

import argparse
import os
import shutil
import subprocess
import tempfile
import venv
from collections.abc import Callable
from pathlib import Path

import numpy as np

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.evaluation.latency import Contender, describe_machine, drawn_feeds, measure_latency
from d4c_onnx.evaluation.peers import loads

_QUARK = """
import sys
import numpy as np
from onnxruntime.quantization import CalibrationDataReader
from quark.onnx import ModelQuantizer
from quark.onnx.quantization.config import Config, get_default_config
source, target, name, feed = sys.argv[1:]
class OneBatch(CalibrationDataReader):
    def __init__(self):
        self.left = iter([{name: np.load(feed)}])
    def get_next(self):
        return next(self.left, None)
ModelQuantizer(Config(global_quant_config=get_default_config("A8W8"))).quantize_model(source, target, OneBatch())
"""
Build = Callable[[Path, Path, Path, str, Path], None]


def _optimum(home: Path, source: Path, target: Path, input_name: str, feed: Path) -> None:
    given = target.with_suffix("")
    given.mkdir()
    shutil.copyfile(source, given / "model.onnx")
    out = target.with_suffix(".out")
    command = [home / "bin" / "optimum-cli", "onnxruntime", "quantize", "--onnx_model", given, "-o", out]
    _run([*command, "--avx512_vnni", "--per_channel"])
    (out / "model_quantized.onnx").rename(target)


def _quark(home: Path, source: Path, target: Path, input_name: str, feed: Path) -> None:
    command = [home / "bin" / "python", "-P", "-c", _QUARK, source, target, input_name, feed]
    _run(command, target.parent)  # it leaves a table


TOOLKITS: dict[str, tuple[list[str], Build]] = {
    "optimum dynamic int8": (["optimum-onnx[onnxruntime]"], _optimum),
    "AMD Quark A8W8": (["amd-quark", "torch", "onnx", "onnxruntime"], _quark),
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, help="the FP32 bundle first")
    parser.add_argument("--toolkits", nargs="+", default=list(TOOLKITS), choices=list(TOOLKITS))
    parser.add_argument("--environments", type=Path, help="folder that keeps the environments for a next run")
    parser.add_argument("--batches", default="1,16")
    parser.add_argument("--rounds", type=int, default=9)
    parser.add_argument("--threads", type=int, default=os.cpu_count() or 1)
    args = parser.parse_args()
    sizes = [int(size) for size in args.batches.split(",")]
    bundles = [open_bundle(path) for path in args.bundles]
    contenders = [
        Contender(f"{bundle.model_name} {bundle.manifest.bits}", bundle.encoders, bundle.session_entries)
        for bundle in bundles
    ]
    feeds = drawn_feeds(bundles[0], sizes, 16)
    with tempfile.TemporaryDirectory() as folder:
        for name in args.toolkits:
            contenders.append(_build(name, bundles[0], feeds, args.environments or Path(folder), Path(folder)))
        towers = measure_latency(contenders, feeds, rounds=args.rounds, threads=args.threads)
    print(f"{describe_machine('cpu', args.threads).title}\n")
    for tower, rows in towers.items():
        print(f"| {tower} encoder | MB | {' | '.join(f'batch {size}, ms | faster' for size in sizes)} |")
        print(f"|---|---|{'---|---|' * len(sizes)}")
        for row in rows:
            found = [row.batches[size] for size in sizes]
            cells = " | ".join(f"{entry.median_ms:.1f} | {entry.speed_up:.2f}x" for entry in found)
            print(f"| {row.name} | {row.size_bytes / 1e6:.1f} | {cells} |")
        print()


def _build(
    name: str, bundle: Bundle, feeds: dict[str, dict[int, np.ndarray]], environments: Path, folder: Path
) -> Contender:
    requirements, build = TOOLKITS[name]
    home = environments.resolve() / name.split()[0].lower()
    made: dict[str, Path] = {}
    try:
        if not home.exists():
            venv.create(home, with_pip=True)
            _run([home / "bin" / "python", "-P", "-m", "pip", "install", "-q", *requirements])
        for tower, source in bundle.encoders.items():
            target, feed = folder / f"{home.name}-{tower}.onnx", folder / f"{tower}.npy"
            np.save(feed, feeds[tower][min(feeds[tower])])
            build(home, source.resolve(), target, bundle.manifest.io[source.name].inputs[0].name, feed)
            reason = loads(target)
            if reason:
                raise RuntimeError(reason)
            made[tower] = target
    except (RuntimeError, OSError) as error:
        print(f"{name}: not measured further ({' '.join(str(error).split())[-300:]})")
    return Contender(name, made)


def _run(command: list[object], folder: Path | None = None) -> None:
    done = subprocess.run([str(part) for part in command], capture_output=True, text=True, check=False, cwd=folder)
    if done.returncode:
        raise RuntimeError(done.stderr or done.stdout)


if __name__ == "__main__":
    main()
