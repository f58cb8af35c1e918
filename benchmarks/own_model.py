"""The deciding table on a model of one's own, with labels of one's own: bits x calibration images, beside FP32.

    python benchmarks/own_model.py my-arch.json --dataset labelled.parquet -o exported \\
        --results docs/results/real-clip.json && python benchmarks/document.py

`my-arch.json` is an open_clip config, its checkpoint (`my-arch.safetensors`) lies beside it. Both are quantised;
the written files answer to every image, executed by onnxruntime. Choices of default are made on such a model: the
embedded ones are too easy to tell them apart.
"""

import argparse
from pathlib import Path
from typing import Any

import open_clip
from results import measured_here

from d4c_onnx import measure, pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.recipe import load_recipe


def rows_of(args: argparse.Namespace) -> list[dict[str, Any]]:
    """Quantise every combination, then measure all of one seed side by side."""
    open_clip.add_model_config(args.config)
    name, weights = args.config.stem, str(args.config.with_suffix(".safetensors"))
    rows = []
    for seed in args.seeds:
        made: list[tuple[str, str, str, Path]] = []
        for method in args.methods:
            output = args.output / f"{method}-{seed}"
            for bits in args.bits:
                for sets in args.sets:
                    keys = [f"seed={seed}", f"synthesis.method={method}", f"quantization.bits={bits}", *sets.split()]
                    recipe = load_recipe(None, [*keys, "evaluation.dataset=fidelity"])
                    report = pipeline.quantize_bundle(name, recipe, output=output, pretrained=weights, overwrite=True)
                    kept = Path(report.bundle).with_name(f"{bits}-{len(made)}")
                    Path(report.bundle).rename(kept)
                    made.append((bits, method, sets, kept))
        fp32 = made[0][3].parent
        found = measure.evaluate_bundles(
            [fp32, *(path for *_, path in made)], load_recipe(None, [f"evaluation.dataset={args.dataset}"])
        )
        for (bits, method, sets, path), row in zip(made, found.bundles[1:], strict=True):
            average = open_bundle(path, verify=False).manifest.quantization
            rows.append(
                {
                    **{"model": name, "seed": seed, "bits": bits, "calibration": method, "overrides": sets},
                    **(row.versus_first.as_dict() if row.versus_first else {}),
                    "fp32_top1": found.bundles[0].top1,
                    "bits_average": average.weight_bits_average if average else None,
                }
            )
            print(rows[-1], flush=True)
    return rows


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("config", type=Path)
    parser.add_argument("--dataset", type=Path, required=True)
    parser.add_argument("-o", "--output", type=Path, default=Path("exported"))
    parser.add_argument("--bits", nargs="+", default=["w8a8", "w4a8"])
    parser.add_argument("--methods", nargs="+", default=["leaves"])
    parser.add_argument("--sets", nargs="+", default=[""], help="overrides, such as quantization.group=0")
    parser.add_argument("--seeds", nargs="+", type=int, default=[0])
    parser.add_argument("--results", type=Path)
    arguments = parser.parse_args()
    measured = measured_here(rows_of(arguments))
    if arguments.results:
        measured.write(arguments.results)
