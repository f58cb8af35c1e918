"""kill -9 at every write: does a rerun always end with the files of an uninterrupted run?

    python benchmarks/kill_sweep.py --results docs/results/kills.json
    python benchmarks/kill_sweep.py --model mini-vit --most 20
    python benchmarks/kill_sweep.py --random 12

Each command runs to its end once; then it is killed at each of its writes, renames and removals (or at `--most` of
them), and run again. The output folder must hold the same bytes, and nothing else. What was finished before should be
there after the kill alone, too; where it is not, that is counted apart. `--random` kills one synthesis with a real
kill -9, again and again, at moments that nobody chose. Exit code 1 when something differs, or was gone.
"""

import argparse
import json
import os
import random
import shutil
import subprocess
import sys
import tempfile
import time
from collections.abc import Callable
from pathlib import Path

# one thread: what forks must not have any other
os.environ.update(OMP_NUM_THREADS="1", MKL_NUM_THREADS="1", OPENBLAS_NUM_THREADS="1")

import hostile_origin
import kill_points
import results

from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256

TINY = ("synthesis.images=4", "synthesis.held_out=2", "synthesis.batch=2", "synthesis.steps=4", "text.prompts=8")
REST = ("text.held_out=4", "evaluation.dataset=fidelity")
KEYS = ("images=24", "held_out=8", "batch=8", "steps=300")
# a checkpoint after every fifth step instead of every 200th: more kinds of moments to be killed at
OFTEN = "from d4c_onnx.synthesis import loop; loop.CHECKPOINT_STEPS = 5; from d4c_onnx.cli import main; main()"

_COLUMNS = {
    "events": "writes, renames, removals",
    "kills": "killed at",
    "gone": "a finished file is there again only after the rerun",
    "wrong": "reruns that differ",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--model", help="one that is known by name, such as mini-vit; else one of a layer a tower")
    parser.add_argument("--most", type=int, help="kills a command; all by default")
    parser.add_argument("--random", type=int, metavar="KILLS", help="instead: so many kills at random moments")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="result file of a sweep to write")
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        wrong = _random(Path(folder), args) if args.random else _sweep(Path(folder), args)
    sys.exit(wrong)


def _sweep(place: Path, args: argparse.Namespace) -> bool:
    """Every command in its turn, each from what the one before left."""
    output, before = place / "out", place / "before"

    def restore() -> None:
        shutil.rmtree(output, ignore_errors=True)
        shutil.copytree(before, output)

    output.mkdir()
    hostile_origin.write_images(place / "images")
    if args.model is None:
        hostile_origin.write_weights(place / "weights", place / "small")
    rows: list[dict[str, object]] = []
    for name, command in _commands(args.model or str(place / "small"), output, place / "images").items():
        shutil.rmtree(before, ignore_errors=True)
        shutil.copytree(output, before)
        found = dict(kill_points.sweep(_done_or_there(command), output, restore, args.most))
        gone, wrong = sum(one.gone > 0 for one in found.values()), sum(bool(one.wrong) for one in found.values())
        print(f"{name}: {len(found)} kills, {gone} with finished files gone, {wrong} wrong", flush=True)
        for number, what in found.items():
            if what.gone or what.wrong:
                print(f"  event {number}: {what.gone} gone, {what.wrong[:300]}", flush=True)
        restore()
        whole = kill_points.run(_done_or_there(command), output)
        rows.append(
            {
                "command": name,
                "events": whole.events,
                "kills": len(found),
                "gone": gone,
                "wrong": wrong,
            }
        )
        if args.results:  # after each command: all of them take long
            columns = [("command", "command", ""), *((key, title, "d") for key, title in _COLUMNS.items())]
            results.measured_here(rows, threads=1, columns=columns).write(args.results)
    return any(row["gone"] or row["wrong"] for row in rows)


def _commands(model: str, output: Path, images: Path) -> dict[str, Callable[[], object]]:
    """What is killed, in this order. Checkpoints and parts are made small, so that there are several."""
    from d4c_onnx import measure, pipeline
    from d4c_onnx.embedding import vectors
    from d4c_onnx.packaging import package_bundle
    from d4c_onnx.recipe_file import load_recipe
    from d4c_onnx.synthesis import loop

    loop.CHECKPOINT_STEPS = vectors.PART_ITEMS = 2
    recipe, machine = load_recipe(None, [*TINY, *REST]), measure.Machine("cpu", "cpu", 1)
    folder = pipeline.bundle_folder(output, model)

    def export(overwrite: bool) -> object:
        return pipeline.export_bundle(model, output, recipe, overwrite=overwrite, machine=machine)

    def quantize(overwrite: bool) -> object:
        return pipeline.quantize_bundle(model, recipe, output=output, overwrite=overwrite, machine=machine)

    def evaluate() -> object:
        [made] = folder.glob("calibration-*/")
        return measure.evaluate_bundles([folder, folder / "w4a8"], recipe, calibration=made, machine=machine)

    def embed(overwrite: bool) -> object:
        return vectors.embed_source(folder / "w4a8", images, output / "v.npy", threads=1, overwrite=overwrite)

    def package(overwrite: bool) -> object:
        return package_bundle(folder / "w4a8", "onnxruntime", output / "package", overwrite=overwrite)

    return {
        "export": lambda: export(overwrite=False),
        "synthesize": lambda: pipeline.synthesize_calibration_set(model, recipe, output=output, machine=machine),
        "quantize": lambda: quantize(overwrite=False),
        "quantize --overwrite": lambda: quantize(overwrite=True),
        "evaluate": evaluate,
        "embed": lambda: embed(overwrite=False),
        "embed --overwrite": lambda: embed(overwrite=True),
        "package": lambda: package(overwrite=False),
        "package --overwrite": lambda: package(overwrite=True),
        "export --overwrite": lambda: export(overwrite=True),
    }


def _done_or_there(command: Callable[[], object]) -> Callable[[], None]:
    """A rerun of what a kill came too late for is refused; that is as good as done."""

    def work() -> None:
        try:
            command()
        except BundleError as error:
            if "already exists" not in str(error):
                raise

    return work


def _random(folder: Path, args: argparse.Namespace) -> bool:
    draw = random.Random(args.seed)
    start = time.monotonic()
    whole = _finish(_start(folder / "whole"))
    seconds = time.monotonic() - start
    moments: list[float] = []
    while True:
        process = _start(folder / "killed")
        if len(moments) < args.random:
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
    return whole != killed


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
