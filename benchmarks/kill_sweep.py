"""kill -9 at random moments: does a rerun always end with the files of an uninterrupted run?

    python benchmarks/kill_sweep.py --kills 12

One synthesis runs to its end; the same is then started again and again elsewhere, and killed at random moments, until
one run ends by itself. Both sets must hold the same bytes. Exit code 1 when they do not.
"""

import argparse
import json
import random
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from d4c_onnx.files import sha256

KEYS = ("images=24", "held_out=8", "batch=8", "steps=300")
# a checkpoint after every fifth step instead of every 200th: more kinds of moments to be killed at
OFTEN = "from d4c_onnx.synthesis import loop; loop.CHECKPOINT_STEPS = 5; from d4c_onnx.cli import main; main()"


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--kills", type=int, default=12, help="at most; then the run may end")
    parser.add_argument("--seed", type=int, default=0)
    args = parser.parse_args()
    draw = random.Random(args.seed)
    with tempfile.TemporaryDirectory() as folder:
        start = time.monotonic()
        whole = _finish(_start(Path(folder) / "whole"))
        seconds = time.monotonic() - start
        moments = []
        while True:
            process = _start(Path(folder) / "killed")
            if len(moments) < args.kills:
                wait = draw.uniform(0.2, 0.5) * seconds  # the start takes a quarter; several runs make it together
                try:
                    process.wait(timeout=wait)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.communicate()
                    moments.append(round(wait, 1))
                    continue
            killed = _finish(process)
            break
    print(f"one run: {seconds:.1f} s; killed after {', '.join(map(str, moments))} s; then left alone")
    print("same files" if whole == killed else f"DIFFERENT files: {whole} and {killed}")
    sys.exit(whole != killed)


def _start(output: Path) -> subprocess.Popen[str]:
    settings = [part for key in KEYS for part in ("--set", f"synthesis.{key}")]
    command = [sys.executable, "-P", "-c", OFTEN, "synthesize", "-o", str(output)]
    return subprocess.Popen(
        [*command, "--json", "--quiet", *settings], stdout=subprocess.PIPE, stderr=subprocess.DEVNULL, text=True
    )


def _finish(process: subprocess.Popen[str]) -> dict[str, str]:
    """SHA-256 of the set's files, and the names of what else was left in the bundle's folder."""
    printed, _ = process.communicate()
    path = Path(json.loads(printed.splitlines()[-1])["calibration"])
    left = {entry.name: "" for entry in path.parent.iterdir() if entry.name.startswith(".")}
    return left | {file.name: sha256(file) for file in sorted(path.iterdir())}


if __name__ == "__main__":
    main()
