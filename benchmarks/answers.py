"""What quantised models answer beside FP32: models x bits x calibration images x recipe keys, a line each.

    python benchmarks/answers.py mini-vit mini-rn -o exported --results docs/results/minis.json
    python benchmarks/answers.py my-arch.json --dataset labelled.parquet --methods leaves \\
        --sets "" quantization.group=32 -o exported --results docs/results/real-clip.json

A model is an embedded one, or an open_clip config with its checkpoint beside it (`my-arch.safetensors`). Both encoders
are quantised, and the written files answer to every image, executed by onnxruntime. Choices of default are made on a
model of really trained weights: the embedded ones are too easy to tell them apart.
"""

import argparse
import shutil
from pathlib import Path
from typing import Any

import open_clip
from results import VERSUS_FP32, measured_here

from d4c_onnx import measure, pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.measure.accuracy import check_dataset_name
from d4c_onnx.recipe_file import load_recipe

COLUMNS = (
    ("model", "model", ""),
    ("bits", "bits", ""),
    ("calibration", "calibration", ""),
    ("keys", "keys", ""),
    ("top1_fp32", "top-1 FP32 %", ".2f"),
    ("top1", "top-1 quantised %", ".2f"),
    ("points", "difference", "+.2f"),
    ("low", "95 % from", "+.2f"),
    ("high", "to", "+.2f"),
    *VERSUS_FP32,
    ("bits_average", "bits a weight", ".2f"),
    ("ratio", "times smaller", ".2f"),
)


def rows_of(args: argparse.Namespace, model: str) -> list[dict[str, Any]]:
    """Quantise every combination of one model, then measure all of them side by side."""
    labelled = load_recipe(None, [f"evaluation.dataset={args.dataset}"])
    check_dataset_name(labelled)  # before an hour of work, not behind it
    name, pretrained = model, None
    if model.endswith(".json"):
        open_clip.add_model_config(Path(model))
        name, pretrained = Path(model).stem, str(Path(model).with_suffix(".safetensors"))
    made: list[tuple[dict[str, Any], Path]] = []
    for method in args.methods:
        for bits in args.bits:
            for sets in args.sets:
                keys = [f"seed={args.seed}", f"synthesis.method={method}", f"quantization.bits={bits}", *sets.split()]
                recipe = load_recipe(None, [*keys, "evaluation.dataset=fidelity"])
                report = pipeline.quantize_bundle(
                    name, recipe, output=args.output, pretrained=pretrained, overwrite=True
                )
                kept = Path(report.bundle).with_name(f"answers-{len(made)}")
                shutil.rmtree(kept, ignore_errors=True)  # of an earlier run
                Path(report.bundle).rename(kept)
                made.append(({"model": name, "bits": bits, "calibration": method, "keys": sets}, kept))
    fp32 = open_bundle(args.output / name)
    found = measure.evaluate_bundles([fp32.path, *(path for _, path in made)], labelled)
    size = sum(path.stat().st_size for path in fp32.encoders.values())
    rows = []
    for (asked, path), row in zip(made, found.bundles[1:], strict=True):
        bundle, versus = open_bundle(path, verify=False), row.versus_first
        assert versus is not None
        assert bundle.manifest.quantization is not None
        shown = {
            **{"top1_fp32": found.bundles[0].top1, "top1": row.top1},
            **{key: getattr(versus.top1_difference, key) for key in ("points", "low", "high")},
            **{key: getattr(versus, key) for key, *_ in VERSUS_FP32},
            "bits_average": bundle.manifest.quantization.weight_bits_average,
            "ratio": size / sum(file.stat().st_size for file in bundle.encoders.values()),
        }
        rows.append(asked | {key: round(value, 5) for key, value in shown.items()})
        print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("models", nargs="+")
    parser.add_argument("--dataset", default="auto", help="a labelled .parquet; auto: the embedded models' own")
    parser.add_argument("-o", "--output", type=Path, default=Path("exported"), help="an empty folder")
    parser.add_argument("--bits", nargs="+", default=["w4a8", "w8a8"])
    parser.add_argument("--methods", nargs="+", default=["d4c"])
    parser.add_argument("--sets", nargs="+", default=[""], help="recipe keys of a row, such as quantization.group=32")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--results", type=Path, help="result file to write, such as docs/results/NAME.json")
    arguments = parser.parse_args()
    measured = [row for model in arguments.models for row in rows_of(arguments, model)]
    if arguments.results:
        columns = [column for column in COLUMNS if any(row[column[0]] != "" for row in measured)]
        measured_here(measured, note=f"seed {arguments.seed}", columns=columns).write(arguments.results)
