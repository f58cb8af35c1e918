"""Miniature runs, killed at every write: a script of `test_kills.py`, in whose process there are threads, and no forks.

Prints a line a kill: the run, the event's number, and what was wrong after the rerun.
"""

import os
import shutil
import sys
from collections.abc import Callable
from pathlib import Path

os.environ["OPENBLAS_NUM_THREADS"] = "1"
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import kill_points
import numpy as np

from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration.dataset import CalibrationSet, open_calibration_set, save_calibration_set, work_folder
from d4c_onnx.calibration.key import CalibrationKey
from d4c_onnx.calibration.set_file import SetManifest
from d4c_onnx.files import claimed, staged_folder, write_file
from d4c_onnx.manifest import Manifest, ModelInfo, Preprocess, Quantization, Signature, TensorInfo, TokenizerInfo
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.results import Accuracy, BundleAccuracy

FILES = ("image_encoder.onnx", "text_encoder.onnx")
_PIXELS = (TensorInfo("pixel_values", "float32", ("batch", 3, 2, 2)),)
_IDS = (TensorInfo("input_ids", "int64", ("batch", "sequence")),)
_EMBEDS = (TensorInfo("embeds", "float32", ("batch", 3)),)
FP32 = Manifest(
    model=ModelInfo("tiny", "random", "0" * 64, False, None, None, True, 77, None, None),
    preprocess=Preprocess((2, 2), (0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
    tokenizer=TokenizerInfo("clip-bpe", 77, "none"),
    io={name: Signature(given, _EMBEDS, 18) for name, given in zip(FILES, (_PIXELS, _IDS), strict=True)},
    seed=0,
)
MADE = Quantization("w4a8", "cpu", "", {}, "1.23", False, dict.fromkeys(FILES, "0" * 64))
SYNTHESIS = {"method": "noise", "template": "a {}"}
KEY = CalibrationKey(0, "0" * 64, 0, SYNTHESIS, None, {}, ("a", "b"), id="0123")


def write_bundle(target: Path, overwrite: bool = False, text: str = "graph", made: Quantization | None = None) -> None:
    """As exporting and quantising write one."""
    with staged_folder(target, overwrite) as stage:
        (stage / "golden").mkdir()
        for name in (*FILES, "golden/image.png"):
            (stage / name).write_text(text)
        write_manifest(stage, Manifest(**{**_fields(FP32), "quantization": made}))


def _fields(manifest: Manifest) -> dict[str, object]:
    return {name: getattr(manifest, name) for name in ("model", "preprocess", "tokenizer", "io", "seed")}


def export(folder: Path) -> None:
    with claimed(folder):
        if not folder.exists():
            write_bundle(folder)


def replace(folder: Path) -> None:
    with claimed(folder):
        write_bundle(folder, overwrite=True, text="another graph")


def synthesize(folder: Path) -> None:
    """A set, whose units lie in a work folder until it is whole."""
    target = folder / "calibration-0123"
    with claimed(folder):
        if not target.exists():
            work = work_folder(target)
            work.mkdir(exist_ok=True)
            pixels = np.zeros((2, 3, 4, 4), np.float32)
            for number in range(2):
                write_file(work / f"unit-{number}.npz", lambda file: np.savez(file, pixels))
            made = CalibrationSet(
                pixels, pixels, (), ("a", "b"), ((1,), (2,)), ("c",), SetManifest("tiny", KEY, {}, {})
            )
            save_calibration_set(target, made, pixels)
            shutil.rmtree(work)
    open_calibration_set(target)


def quantize(folder: Path) -> None:
    """Two widths, the second measured, which writes its manifest again."""
    with claimed(folder):
        for name in ("w4a8", "w8a8"):
            if not (folder / name).exists():
                write_bundle(folder / name, made=MADE)
        bundle = open_bundle(folder / "w8a8")
        if bundle.manifest.quantization is not None and bundle.manifest.quantization.accuracy is None:
            rows = (BundleAccuracy("fp32"), BundleAccuracy("w8a8"))
            write_manifest(bundle.path, bundle.manifest.measured(Accuracy("fidelity", 1, rows, prompts=1)))


def _tell(run: str, number: int, wrong: str) -> None:
    sys.stdout.write(f"{run} {number} {wrong}\n")


def main(place: Path) -> None:
    folder = place / "out" / "tiny"

    def empty() -> None:
        shutil.rmtree(place / "out", ignore_errors=True)
        (place / "out").mkdir()

    def exported() -> None:
        empty()
        shutil.copytree(place / "exported", folder)

    def finished() -> None:
        empty()
        shutil.copytree(place / "finished", folder)

    export(place / "exported")
    for make in (export, synthesize, quantize):
        make(place / "finished")
    runs: tuple[tuple[Callable[[Path], None], Callable[[], None]], ...]
    runs = ((export, empty), (synthesize, exported), (quantize, exported), (replace, finished))
    for work, prepare in runs:
        for number, found in kill_points.sweep(lambda work=work: work(folder), place / "out", prepare):
            _tell(work.__name__, number, found.wrong or ("finished files are gone" if found.gone else ""))
    # after the kill alone, a folder is what it was, or what it becomes
    finished()
    before = kill_points.content(folder)
    replace(folder)
    after, number = kill_points.content(folder), 0
    while True:
        finished()
        if kill_points.run(lambda: replace(folder), place / "out", number).code != kill_points.KILLED:
            break
        with claimed(folder):
            left = kill_points.content(folder)
        _tell("kept", number, "" if left in (before, after) else "is neither the old one nor the new one")
        number += 1


if __name__ == "__main__":
    main(Path(sys.argv[1]))
