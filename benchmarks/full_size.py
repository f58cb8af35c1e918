"""A full-size architecture with random weights through the whole pipeline: sizes, int8 kernels, seconds, peak memory.

    python benchmarks/full_size.py ViT-B-32 -o DIR --results docs/results/full-size-vit-b-32.json

Random weights say nothing about accuracy; what they prove is that the files are small, run on int8 kernels, and can be
made on a small machine. Calibration images are noise, since a random model has nothing to synthesise. Prints the rows,
and writes them with `--results` as docs/results/ wants them.
"""

import argparse
import resource
import time
from pathlib import Path

from results import measured_here
from tables import plain

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.pipeline.quantize_report import QuantizeReport
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.kernels import count_kernels

COLUMNS = [
    ["encoder", "encoder", ""],
    ["fp32_mb", "FP32 MB", ".1f"],
    ["quantized_mb", "quantised MB", ".1f"],
    ["ratio", "times smaller", ".2f"],
    ["int8", "int8 products", ""],
    ["float", "float products (attention)", ""],
    ["bits", "bits a weight", ".2f"],
    ["seconds", "seconds", ".0f"],
    ["peak_gb", "peak memory, GB", ".2f"],
]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ViT-B-32")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    parser.add_argument("--results", type=Path, help="result file to write, such as docs/results/NAME.json")
    args = parser.parse_args()
    start = time.perf_counter()
    recipe = load_recipe(None, ["synthesis.method=noise", f"quantization.bits={args.bits}", *args.overrides])
    report = pipeline.quantize_bundle(args.model, recipe, output=args.output, pretrained="random", overwrite=True)
    rows = rows_of(report, time.perf_counter() - start)
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in report.seconds.items())
    found = measured_here(rows, note=f"{args.model} {args.bits}, random weights: {steps}", columns=COLUMNS)
    for row in plain([found]):
        print(" | ".join(row))
    print(found.note)
    if args.results:
        found.write(args.results)


def rows_of(report: QuantizeReport, seconds: float) -> list[dict[str, object]]:
    """A row per encoder and one for both; `seconds` and the peak memory are of the whole run."""
    encoders = open_bundle(report.bundle, verify=False).encoders
    kernels = {tower: count_kernels(path) for tower, path in encoders.items()}
    rows = []
    for name, ratio in report.size_ratio.items():
        rows.append(
            {
                "encoder": name,
                "fp32_mb": report.size_bytes.fp32[name] / 1e6,
                "quantized_mb": report.size_bytes.quantized[name] / 1e6,
                "ratio": ratio,
                **{kind: kernels[name][kind] if name in kernels else None for kind in ("int8", "float")},
                **dict.fromkeys(("bits", "seconds", "peak_gb")),
            }
        )
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    rows[-1] |= {"bits": report.weight_bits_average, "seconds": seconds, "peak_gb": peak}
    return rows


if __name__ == "__main__":
    main()
