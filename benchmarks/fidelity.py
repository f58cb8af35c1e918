"""Evidence for the defaults: models x bits x calibration source x rounding x folds, through the written files.

    python benchmarks/fidelity.py --train cifar10-train.parquet -o exported --seeds 0 1 2 --write docs/fidelity.md

Each row quantises both encoders and measures them with onnxruntime on all 10,000 test images, beside FP32. `real` are
128 training images (a control), `noise` is N(0, 1), `pink` is 1/f noise; stress 30 are the same models with outlier
channels inflated 30 times, FP32 output unchanged. Rows that are in the results file already are not run again.
`--write` puts the table into the document, between its markers, and a picture beside it (needs matplotlib, the
`benchmarks` extra).
"""

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from pathlib import Path

import numpy as np
from document import each_seed, run

from d4c_onnx import measure as measuring
from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.quantization.folding.stress import stress_bundle
from d4c_onnx.recipe import load_recipe

MODELS = ("mini-vit", "mini-rn")
# bits, calibration source, stress factor, overrides of the quantization section
ROWS: list[tuple[str, str, int, str]] = [
    ("w8a8", "d4c", 1, ""),
    ("w8a8", "noise", 1, ""),
    ("w8a8", "pink", 1, ""),
    ("w8a8", "real", 1, ""),
    ("w8a8", "d4c", 1, "headroom=1.0 clip_weight=1.0"),
    ("w8a8", "d4c", 1, "smoothing=none"),
    ("w8a8", "d4c", 1, "smoothing_threshold=0.8"),
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
    ("w4a8", "d4c", 1, "rounding=adaround adaround_steps=300"),
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
                    dump = recipe.model_dump(mode="json")
                    data = open_calibration_set(calibration, verify=False)
                    target = folder / str(number)
                    quantize_bundle_files(origin, data, target, recipe.quantization, recipe_dump=dump)
                    seconds.append(time.perf_counter() - clock)
                    made.append(target)
                report = measuring.evaluate_bundles([bundle.path, *made], load_recipe())
                for row, spent, measured in zip(group, seconds, report["bundles"][1:], strict=True):
                    average = open_bundle(Path(measured["bundle"]), verify=False).manifest["weight_bits_average"]
                    results[_key(model, row, seed)] = {
                        **measured["versus_first"],
                        "top1": measured["top1"],
                        "seconds": spent,
                        "bits": average,
                    }
                yield


def _key(model: str, row: tuple[str, str, int, str], seed: int) -> str:
    return "|".join((model, *(str(part) for part in row), str(seed)))


def _groups(results: dict[str, dict]) -> dict[tuple[str, ...], list[dict]]:
    """(model, bits, source, stress, overrides) -> its seeds, in the order of ROWS."""
    groups: dict[tuple[str, ...], list[dict]] = {}
    for model in MODELS:
        for row in ROWS:
            found = [value for key, value in results.items() if key.rpartition("|")[0] == _key(model, row, 0)[:-2]]
            if found:
                groups[(model, *(str(part) for part in row))] = found
    return groups


def table(results: dict[str, dict]) -> str:
    """One line per model, bits, source, stress and overrides: means over seeds."""
    lines = [
        "| model | bits | calibration | stress | overrides | top-1 difference (each seed) | widest 95 % interval "
        "| agreement % | cosine image | cosine text | similarity rmse | bits a weight | quantise s |",
        "|---|---|---|---|---|---|---|---|---|---|---|---|---|",
    ]
    for (model, bits, source, factor, sets), rows in _groups(results).items():
        points = [row["top1_difference"]["points"] for row in rows]
        found = [(row["top1_difference"]["low"], row["top1_difference"]["high"]) for row in rows]
        low, high = max(found, key=lambda interval: interval[1] - interval[0])

        def mean(name: str, rows: list[dict] = rows) -> float:
            return float(np.mean([row[name] for row in rows]))

        lines.append(
            f"| {model} | {bits} | {source} | {factor if factor != '1' else ''} | {sets} "
            f"| {each_seed(points)} | [{low:+.2f}, {high:+.2f}] | {mean('agreement'):.2f} "
            f"| {mean('cosine_image'):.5f} | {mean('cosine_text'):.6f} | {mean('similarity_rmse'):.5f} "
            f"| {mean('bits'):.2f} | {mean('seconds'):.0f} |"
        )
    return "\n".join(lines)


def picture(results: dict[str, dict], path: Path) -> None:
    """Disagreement with FP32 of every row, both models side by side, each seed a dot."""
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    groups = {key: rows for key, rows in _groups(results).items() if key[1] != "w4a4"}
    labels = list(dict.fromkeys(key[1:] for key in groups))
    figure, axes = plt.subplots(figsize=(9, 0.26 * len(labels) + 1.2), layout="constrained")
    for offset, (model, color) in enumerate(zip(MODELS, ("tab:blue", "tab:orange"), strict=True)):
        for position, label in enumerate(labels):
            rows = groups.get((model, *label), [])
            values = [100 - row["agreement"] for row in rows]
            line = position + 0.25 * offset - 0.12
            axes.plot(values, [line] * len(values), "o", color=color, ms=4, label=model if position == 0 else None)
    names = [
        f"{bits} {source}{'' if factor == '1' else f' stress {factor}'} {sets}" for bits, source, factor, sets in labels
    ]
    axes.set(yticks=range(len(labels)), yticklabels=names, xscale="log", xlabel="answers that differ from FP32, %")
    axes.tick_params(axis="y", labelsize=8)
    axes.invert_yaxis()
    axes.grid(alpha=0.3)
    axes.legend()
    figure.savefig(path, dpi=110)
    plt.close(figure)


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "exported/fidelity.json", MODELS, measure, table, picture)
