"""What each part of the generator is worth, and what it costs: W4A8 and W6A6 answers against seconds.

    python benchmarks/synthesis.py --train cifar10-train.parquet -o exported --seeds 0 1 2 \\
        --results docs/results/synthesis.json --picture docs/synthesis.png && python benchmarks/document.py

Each row synthesises a calibration set, quantises both encoders twice, and measures the written files with onnxruntime
on all 10,000 test images, beside FP32. Rows that are in the cache already are not run again. `real` opens training
images (a control). `--picture` needs matplotlib, the `benchmarks` extra.
"""

import argparse
import re
import shutil
import time
from collections.abc import Iterator
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

import numpy as np
from results import MEASURES, run

from d4c_onnx import measure as measuring
from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.calibration.dataset import open_calibration_set, work_folder
from d4c_onnx.calibration.key import calibration_key
from d4c_onnx.calibration.method import METHODS, Method
from d4c_onnx.models.catalogue import embedded_models
from d4c_onnx.models.load import load_model
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.recipe import Recipe
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.synthesis import synthesize

MODELS = ("mini-vit", "mini-rn")
BITS = ("w4a8", "w6a6")


@dataclass(frozen=True, slots=True)
class Row:
    """One way to make images.

    Attributes:
        recipe: a shipped recipe.
        keys: overrides of its synthesis config.
        changes: of the method's constants.
        models: those it applies to.
    """

    recipe: str = "default"
    keys: str = ""
    changes: dict[str, Any] = field(default_factory=dict)
    models: tuple[str, ...] = MODELS


UNGUIDED = ("noise", "pink", "leaves", "real")  # they ask no model
VIT, RN = MODELS[:1], MODELS[1:]
ROWS = {
    "default": Row(),
    "published, 500 of 3,000 passes": Row("paper", "steps=500"),
    "published": Row("paper"),
    "noise": Row(keys="method=noise"),
    "pink": Row(keys="method=pink"),
    "leaves": Row(keys="method=leaves"),
    "real": Row(keys="method=real"),
    "bns": Row(keys="method=bns", models=RN),
    "pse": Row(keys="method=pse", models=VIT),
    "PGSI": Row(changes={"scg": False, "pae": False, "bns_weight": 0.0}),
    "PGSI + SCG": Row(changes={"pae": False, "bns_weight": 0.0}),
    "light": Row(keys="method=d4c-light"),
    "PGSI + PAE": Row(changes={"scg": False, "bns_weight": 0.0}),
    "no whole-image view": Row(changes={"whole_image_weight": 0.0}),
    "random labels": Row(changes={"labels": "random"}),
    "free pixels": Row(changes={"image": "pixel"}),
    "one Adam for all": Row(changes={"shared_optimizer": True}),
    "without BatchNorm statistics": Row(changes={"bns_weight": 0.0}, models=RN),
    "BatchNorm statistics, weight 30": Row(changes={"bns_weight": 30.0}, models=RN),
    "BatchNorm statistics, weight 100": Row(changes={"bns_weight": 100.0}, models=RN),
    "BatchNorm statistics, weight 1000": Row(changes={"bns_weight": 1000.0}, models=RN),
    "PGSI + BatchNorm statistics": Row(changes={"scg": False, "pae": False}, models=RN),
    "PGSI + PAE + BatchNorm statistics": Row(changes={"scg": False}, models=RN),
    "total variation, weight 0.3": Row(changes={"tv_weight": 0.3}),
    "total variation, weight 1": Row(changes={"tv_weight": 1.0}),
    "total variation, weight 3": Row(changes={"tv_weight": 3.0}),
    "25 steps": Row(keys="steps=25"),
    "stopped early, 0.02": Row(keys="early_stop_tolerance=0.02"),
    "float32": Row(keys="precision=float32"),
    "20 steps": Row(keys="steps=20"),
    "10 steps": Row(keys="steps=10"),
    "200 steps": Row(keys="steps=200"),
    "started from leaves": Row(changes={"start": "leaves"}),
    "started from leaves, 25 steps": Row(keys="steps=25", changes={"start": "leaves"}),
    "started from leaves, 10 steps": Row(keys="steps=10", changes={"start": "leaves"}),
    "8 images": Row(keys="images=8"),
    "32 images": Row(keys="images=32"),
    "512 images": Row(keys="images=512"),
    "512 images, 100 steps": Row(keys="images=512 steps=100"),
    "bns, 512 images": Row(keys="method=bns images=512", models=RN),
}


def measure(args: argparse.Namespace, results: dict[str, dict]) -> Iterator[None]:
    """Fill in every row that is missing, some of one model and seed at a time: FP32 runs once for them."""
    output = Path(args.output)
    for seed in args.seeds:
        for model in args.models:
            if not (output / model / "manifest.json").exists():
                pipeline.export_bundle(model, output, load_recipe())
            rows = [name for name, row in ROWS.items() if model in row.models and re.search(args.only, name)]
            missing = [name for name in rows if _key(model, name, seed) not in results]
            for start in range(0, len(missing), args.group):
                _measure_group(args, results, model, missing[start : start + args.group], seed)
                yield


def _measure_group(args: argparse.Namespace, results: dict[str, dict], model: str, names: list[str], seed: int) -> None:
    output = Path(args.output)
    bundle = open_bundle(output / model)
    folder = output / "synthesis" / model
    shutil.rmtree(folder, ignore_errors=True)
    folder.mkdir(parents=True)
    made, seconds = [], {}
    for number, name in enumerate(names):
        # Seconds of all cores together: they stay comparable when the machine does other work beside this.
        before = set((output / model).iterdir())
        clock = time.process_time()
        made_at, data = calibration_set(model, name, seed, args.train, output)
        spent = time.process_time() - clock
        if not {made_at, work_folder(made_at)} & before:  # else some of it, or all, was made by an earlier run
            seconds[name] = spent
        for bits in BITS:
            # The quantisation is the default recipe's for every row: only the images differ.
            recipe = load_recipe(None, [f"quantization.bits={bits}"])
            target = folder / f"{number}-{bits}"
            quantize_bundle_files(bundle, data, target, recipe)
            made.append(target)
    report = measuring.evaluate_bundles([bundle.path, *made], load_recipe())
    measured = iter(report.bundles[1:])
    for name in names:
        found: dict[str, Any] = {"cpu_seconds": seconds[name]} if name in seconds else {}
        for bits in BITS:
            versus = next(measured).versus_first
            assert versus is not None
            found[bits] = versus.as_dict()
        results[_key(model, name, seed)] = found


def calibration_set(model: str, name: str, seed: int, train: Path | None, output: Path) -> tuple[Path, CalibrationSet]:
    """A row's set and its folder; made beside the model's bundle when it is not there. The row `real` reads `train`."""
    row = ROWS[name]
    overrides = [f"seed={seed}", *(f"synthesis.{item}" for item in row.keys.split())]
    if "method=real" in row.keys:
        if train is None:
            raise SystemExit("the control `real` needs --train FILE.parquet; or leave it out with --only")
        overrides.append(f"synthesis.source={train}")
    recipe = load_recipe(row.recipe, overrides)
    if not row.changes:
        return pipeline.synthesize_calibration_set(model, recipe, output=output)
    return _changed_set(model, recipe, replace(METHODS[recipe.synthesis.method], **row.changes), output)


def _changed_set(model: str, recipe: Recipe, method: Method, output: Path) -> tuple[Path, CalibrationSet]:
    """What no recipe asks for: a method with other constants."""
    loaded = load_model(model)
    nouns = embedded_models()[model].nouns
    key = calibration_key(loaded.weights_sha256, recipe.synthesis, recipe.text, nouns, recipe.seed, method=method)
    target = pipeline.bundle_folder(output, model) / f"calibration-{key.id}"
    if target.exists():
        return target, open_calibration_set(target)
    config, text = recipe.synthesis, recipe.text
    return target, synthesize(loaded, target, config, text, nouns, seed=recipe.seed, device="auto", method=method)


def _key(model: str, name: str, seed: int) -> str:
    return f"{model}|{name}|{seed}"


def _groups(results: dict[str, dict]) -> dict[tuple[str, str], list[dict]]:
    """(model, row's name) -> its seeds: in the order of ROWS, then the rows whose key is gone."""
    gone = dict.fromkeys(name for key in results if (name := key.split("|")[1]) not in ROWS)
    groups = {}
    for model in MODELS:
        for name in (*ROWS, *gone):
            found = [value for key, value in sorted(results.items()) if key.rpartition("|")[0] == f"{model}|{name}"]
            if found:
                groups[model, name] = found
    return groups


def summarize(results: dict[str, dict]) -> list[dict[str, Any]]:
    """One row per model and kind of images: each seed's values at both widths."""
    rows = []
    for (model, name), found in _groups(results).items():
        times = [entry["cpu_seconds"] for entry in found if "cpu_seconds" in entry]
        row: dict[str, Any] = {"model": model, "images": name, "cpu_seconds": times}
        for bits in BITS:
            tops = [entry[bits]["top1_difference"] for entry in found]
            row[bits] = {key: [top[key] for top in tops] for key in ("points", "low", "high")}
            row[bits] |= {name: [entry[bits][name] for entry in found] for name in MEASURES}
        rows.append(row)
    return rows


def _cpu_seconds(rows: list[dict]) -> float | None:
    """The median over seeds; None where only rows of an older script, with wall time, are there."""
    found = [row["cpu_seconds"] for row in rows if "cpu_seconds" in row]
    return float(np.median(found)) if found else None


def _mean(rows: list[dict], bits: str, name: str) -> float:
    return float(np.mean([row[bits][name] for row in rows]))


def _alike(rows: list[dict], others: list[dict]) -> bool:
    """About the same answers for about the same seconds."""
    seconds, theirs = _cpu_seconds(rows), _cpu_seconds(others)
    near = abs(_mean(rows, BITS[0], "agreement") - _mean(others, BITS[0], "agreement")) < 0.25
    return near and seconds is not None and theirs is not None and 0.7 < seconds / theirs < 1.4


def picture(results: dict[str, dict], path: Path) -> None:
    """W4A8 disagreement with FP32 against seconds, one panel a model: each row's mean, and the range of its seeds.

    Rows like the default have no name, and rows whose key is gone are left out.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    figure, axes = plt.subplots(1, 2, figsize=(13, 7), layout="constrained")
    groups = _groups(results)
    for panel, model in zip(axes, MODELS, strict=True):
        usual = groups.get((model, "default"), [])
        for (owner, name), rows in groups.items():
            seconds = _cpu_seconds(rows)
            if owner != model or seconds is None or name not in ROWS:
                continue
            values = [100 - row[BITS[0]]["agreement"] for row in rows]
            color = "tab:red" if name == "default" else "tab:green" if name in UNGUIDED else "tab:blue"
            panel.plot(max(1.0, seconds), np.mean(values), "o", color=color, ms=5)
            panel.vlines(max(1.0, seconds), min(values), max(values), color=color, alpha=0.35, lw=1)
            if name != "default" and usual and _alike(rows, usual):
                continue  # a dozen names on one spot say nothing
            panel.annotate(
                name,
                (max(1.0, seconds), float(np.mean(values))),
                fontsize=7,
                xytext=(5, -2),
                textcoords="offset points",
            )
        panel.set(
            xscale="log",
            xlim=(0.8, 8000),
            title=model,
            xlabel="seconds of synthesis, all cores together",
            ylabel="W4A8 answers that differ from FP32, %",
        )
        panel.grid(alpha=0.3)
    figure.savefig(path, dpi=100)
    plt.close(figure)


if __name__ == "__main__":
    run(__doc__.splitlines()[0], "exported/synthesis.json", MODELS, measure, summarize, picture)
