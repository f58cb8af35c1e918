"""Evidence for the defaults: models x bits x calibration source x rounding x ranges, through the written files.

    python benchmarks/fidelity.py --train cifar10-train.parquet -o exported --seeds 0 1 2

Each row quantises both encoders and measures them with onnxruntime on all 10,000 test images, beside FP32. `real` are
128 training images (the control; only this script ever opens them), `noise` is N(0, 1). Prints Markdown. Rows that are
in the results file already are not run again.
"""

import argparse
import dataclasses
import json
from collections.abc import Iterator
from pathlib import Path

import numpy as np

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration.dataset import CalibrationSet, save_calibration_set
from d4c_onnx.evaluation.datasets import open_dataset
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.preprocess import preprocess_image

IMAGES = 128
MODELS = ("mini-vit", "mini-rn")
# bits, calibration source, overrides
ROWS: list[tuple[str, str, tuple[str, ...]]] = [
    ("w8a8", "d4c", ()),
    ("w8a8", "d4c", ("headroom=1.0", "clip_weight=1.0")),
    ("w8a8", "d4c", ("rounding=gptaq",)),
    ("w8a8", "noise", ()),
    ("w8a8", "real", ()),
    ("w4a8", "d4c", ("rounding=nearest",)),
    ("w4a8", "d4c", ("rounding=gptq",)),
    ("w4a8", "d4c", ()),
    ("w4a8", "d4c", ("bias_correction=true",)),
    ("w4a8", "noise", ()),
    ("w4a8", "real", ()),
    ("w6a6", "d4c", ()),
    ("w6a6", "d4c", ("rounding=gptaq",)),
    ("w4a4", "d4c", ()),
    ("w4a4", "d4c", ("rounding=gptaq",)),
]


def calibration_set(model: str, source: str, seed: int, output: Path, train: Path | None) -> Path:
    """The folder of a set of one source and seed; made when it is not there."""
    method = "noise" if source == "noise" else "d4c"
    recipe = load_recipe(None, [f"seed={seed}", f"synthesis.method={method}"])
    folder, made = pipeline.synthesize_calibration_set(model, recipe, output=output)
    if source != "real":
        return folder
    target = output / model / f"calibration-real-{seed}"
    if not target.exists():
        save_calibration_set(target, real_images(made, model, seed, output, train), np.zeros((1, 3, 8, 8)))
    return target


def real_images(like: CalibrationSet, model: str, seed: int, output: Path, train: Path | None) -> CalibrationSet:
    """`like` with its images replaced by real training images."""
    if train is None:
        raise SystemExit("the control needs --train FILE.parquet (with FILE.parquet.classes.txt beside it)")
    config = open_bundle(output / model, verify=False).manifest["preprocess"]
    dataset = open_dataset(str(train))
    chosen = np.random.default_rng([seed, 9]).choice(len(dataset), IMAGES, replace=False)
    part = dataclasses.replace(dataset, labels=dataset.labels[chosen], encoded=[dataset.encoded[i] for i in chosen])
    pixels = np.stack([preprocess_image(image, config) for image in next(part.batches(IMAGES))])
    manifest = {"model": model, "key": {"id": f"real-{seed}"}}
    return dataclasses.replace(like, pixel_values=pixels, manifest=manifest)


def measure(args: argparse.Namespace, results: dict[str, dict]) -> Iterator[tuple[str, dict]]:
    """Every row and seed: its key and its numbers."""
    for model in args.models:
        pipeline_output = Path(args.output)
        if not (pipeline_output / model / "manifest.json").exists():
            pipeline.export_bundle(model, pipeline_output, load_recipe())
        for bits, source, sets in ROWS:
            if source == "real" and args.train is None:
                continue
            for seed in args.seeds:
                key = "|".join((model, bits, source, " ".join(sets), str(seed)))
                if key not in results:
                    calibration = calibration_set(model, source, seed, pipeline_output, args.train)
                    overrides = [
                        f"seed={seed}",
                        f"quantization.bits={bits}",
                        *(f"quantization.{item}" for item in sets),
                    ]
                    report = pipeline.quantize_bundle(
                        str(pipeline_output / model),
                        load_recipe(None, overrides),
                        output=pipeline_output,
                        calibration=calibration,
                        overwrite=True,
                    )
                    versus = report["accuracy"]["bundles"][1]["versus_first"]
                    results[key] = {**versus, "seconds": report["seconds"]["quantize"], "top1": report["top1"]}
                yield key, results[key]


def table(results: dict[str, dict]) -> str:
    """One line per model, bits, source and overrides: means over seeds."""
    groups: dict[str, list[dict]] = {}
    for key, row in results.items():
        groups.setdefault(key.rpartition("|")[0], []).append(row)
    lines = [
        "| model | bits | calibration | overrides | top-1 difference (each seed) | widest 95 % interval | agreement % "
        "| cosine image | cosine text | similarity rmse | quantise s |",
        "|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for key, rows in groups.items():
        points = [row["top1_difference"]["points"] for row in rows]
        low = min(row["top1_difference"]["low"] for row in rows)
        high = max(row["top1_difference"]["high"] for row in rows)

        def mean(name: str, rows: list[dict] = rows) -> float:
            return float(np.mean([row[name] for row in rows]))

        each = ", ".join(f"{value:+.2f}" for value in points)
        lines.append(
            f"| {' | '.join(key.split('|'))} | **{np.mean(points):+.2f}** ({each}) | [{low:+.2f}, {high:+.2f}] "
            f"| {mean('agreement'):.2f} | {mean('cosine_image'):.5f} | {mean('cosine_text'):.5f} "
            f"| {mean('similarity_rmse'):.5f} | {mean('seconds'):.0f} |"
        )
    return "\n".join(lines)


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("-o", "--output", default="exported")
    parser.add_argument("--train", type=Path, help="parquet with training images, for the `real` control")
    parser.add_argument("--models", nargs="+", default=list(MODELS))
    parser.add_argument("--seeds", nargs="+", type=int, default=[0, 1, 2])
    parser.add_argument("--results", type=Path, default=Path("exported/fidelity.json"))
    args = parser.parse_args()
    results: dict[str, dict] = json.loads(args.results.read_text()) if args.results.exists() else {}
    for _ in measure(args, results):
        args.results.parent.mkdir(parents=True, exist_ok=True)
        args.results.write_text(json.dumps(results, indent=1))
    print(table(results))


if __name__ == "__main__":
    main()
