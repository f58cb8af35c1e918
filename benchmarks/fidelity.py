"""Evidence for the defaults: models x bits x calibration source x rounding x folds, through the written files.

    python benchmarks/fidelity.py --train cifar10-train.parquet -o exported --seeds 0 1 2 \\
        --results docs/results/fidelity.json && python benchmarks/document.py

Each row quantises both encoders and measures them with onnxruntime on all 10,000 test images, beside FP32. `real` are
128 training images (a control), `noise` is N(0, 1), `pink` is 1/f noise; stress 30 are the same models with outlier
channels inflated 30 times, FP32 output unchanged. Rows that are in the cache already are not run again: give another
one, or none, when the code has changed. Without `--results` the rows are printed as JSON.
"""

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from results import MEASURES, run

from d4c_onnx import measure as measuring
from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.quantization.rewrites.stress import stress_bundle
from d4c_onnx.recipe_file import load_recipe

MODELS = ("mini-vit", "mini-rn")
# bits, calibration source, stress factor, overrides of the quantization config
ROWS: list[tuple[str, str, int, str]] = [
    ("w8a8", "d4c", 1, ""),
    ("w8a8", "noise", 1, ""),
    ("w8a8", "pink", 1, ""),
    ("w8a8", "real", 1, ""),
    ("w8a8", "d4c", 1, "ranges=mse-plain"),
    ("w8a8", "d4c", 1, "smoothing=none"),
    ("w8a8", "d4c", 1, "rounding=gptaq"),
    ("w8a8", "d4c", 1, "correction=bias"),
    ("w4a8", "d4c", 1, ""),
    ("w4a8", "noise", 1, ""),
    ("w4a8", "pink", 1, ""),
    ("w4a8", "real", 1, ""),
    ("w4a8", "d4c", 1, "rounding=nearest"),
    ("w4a8", "d4c", 1, "rounding=nearest correction=affine"),
    ("w4a8", "d4c", 1, "rounding=gptq"),
    ("w4a8", "d4c", 1, "smoothing=none"),
    ("w4a8", "d4c", 1, "correction=bias"),
    ("w4a8", "d4c", 1, "correction=affine"),
    ("w4a8", "real", 1, "correction=affine"),
    ("w4a8", "d4c", 1, "average_bits=4.8"),
    ("w6a6", "d4c", 1, ""),
    ("w6a6", "real", 1, ""),
    ("w6a6", "d4c", 1, "smoothing=none"),
    ("w6a6", "d4c", 1, "rounding=gptaq"),
    ("w4a4", "d4c", 1, ""),
    ("w4a4", "d4c", 1, "rounding=gptaq"),
    ("w8a8", "d4c", 30, "smoothing=none"),
    ("w8a8", "d4c", 30, ""),
    ("w8a8", "d4c", 100, "smoothing=none"),
    ("w8a8", "d4c", 100, ""),
    ("w4a8", "d4c", 30, ""),
    ("w4a8", "d4c", 100, ""),
]


def calibration_set(model: str, source: str, seed: int, output: Path, train: Path | None) -> Path:
    """The folder of a set of one source and seed; made when it is not there."""
    keys = [f"seed={seed}", f"synthesis.method={source}"]
    if source == "real":
        if train is None:
            raise SystemExit("the control needs --train FILE.parquet")
        keys.append(f"synthesis.source={train}")
    return pipeline.synthesize_calibration_set(model, load_recipe(None, keys), output=output)[0]


def measure(args: argparse.Namespace, results: dict[str, dict]) -> Iterator[None]:
    """Fill in every row that is missing, a group of one model and seed at a time: FP32 runs once per group."""
    output = Path(args.output)
    for seed in args.seeds:
        for model in args.models:
            if not (output / model / "manifest.json").exists():
                pipeline.export_bundle(model, output, load_recipe())
            bundle = open_bundle(output / model)
            missing = [row for row in ROWS if _key(model, row, seed) not in results]
            missing = [row for row in missing if re.search(args.only, _key(model, row, seed))]
            folder = output / "fidelity" / model
            for start in range(0, len(missing), args.group):
                group = missing[start : start + args.group]
                shutil.rmtree(folder, ignore_errors=True)
                folder.mkdir(parents=True)
                made, seconds = [], []
                for number, (bits, source, factor, sets) in enumerate(group):
                    overrides = [f"quantization.{item}" for item in sets.split()]
                    recipe = load_recipe(None, [f"seed={seed}", f"quantization.bits={bits}", *overrides])
                    calibration = calibration_set(model, source, seed, output, args.train)
                    origin = stress_bundle(bundle, factor, folder / f"stress-{number}") if factor > 1 else bundle
                    clock = time.perf_counter()
                    data = open_calibration_set(calibration, verify=False)
                    target = folder / str(number)
                    quantize_bundle_files(origin, data, target, recipe)
                    seconds.append(time.perf_counter() - clock)
                    made.append(target)
                report = measuring.evaluate_bundles([bundle.path, *made], load_recipe())
                for row, spent, measured in zip(group, seconds, report.bundles[1:], strict=True):
                    quantization = open_bundle(Path(measured.bundle), verify=False).manifest.quantization
                    assert quantization is not None
                    assert measured.versus_first is not None
                    results[_key(model, row, seed)] = {
                        **measured.versus_first.as_dict(),
                        "top1": measured.top1,
                        "seconds": spent,
                        "bits": quantization.weight_bits_average,
                    }
                yield


def _key(model: str, row: tuple[str, str, int, str], seed: int) -> str:
    return "|".join((model, *(str(part) for part in row), str(seed)))


def summarize(results: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per model, bits, source, stress and overrides, in the order of ROWS: each seed's values."""
    rows = []
    for model in MODELS:
        for row in ROWS:
            keys = [key for key in sorted(results) if key.rpartition("|")[0] == _key(model, row, 0).rpartition("|")[0]]
            if not keys:
                continue
            found = [results[key] for key in keys]
            spans = [(entry["top1_difference"]["low"], entry["top1_difference"]["high"]) for entry in found]
            low, high = max(spans, key=lambda span: span[1] - span[0])
            bits, source, factor, sets = row
            rows.append(
                {
                    "model": model,
                    "bits": bits,
                    "calibration": source,
                    "stress": factor,
                    "overrides": sets,
                    "seeds": [int(key.rpartition("|")[2]) for key in keys],
                    "points": [entry["top1_difference"]["points"] for entry in found],
                    "low": low,
                    "high": high,
                    **{name: [entry[name] for entry in found] for name in MEASURES},
                    "bits_average": found[0]["bits"],
                    "seconds": [entry["seconds"] for entry in found],
                }
            )
    return rows


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "exported/fidelity.json", MODELS, measure, summarize)
