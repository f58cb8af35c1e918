"""A full-size architecture with random weights through the whole pipeline: sizes, int8 kernels, seconds, peak memory.

    python benchmarks/full_size.py ViT-B-32 -o /tmp/full-size

Random weights say nothing about accuracy; what they prove is that the files are small, run on int8 kernels, and can be
made on a small machine. Calibration images are noise, since a random model has nothing to synthesise. Prints Markdown.
"""

import argparse
import resource
import time
from pathlib import Path

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.kernels import count_kernels


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ViT-B-32")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--bits", default="w4a8")
    parser.add_argument("--set", dest="overrides", action="append", default=[])
    args = parser.parse_args()
    start = time.perf_counter()
    recipe = load_recipe(None, ["synthesis.method=noise", f"quantization.bits={args.bits}", *args.overrides])
    report = pipeline.quantize_bundle(args.model, recipe, output=args.output, pretrained="random", overwrite=True)
    seconds = time.perf_counter() - start
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6  # kilobytes on Linux
    print("| encoder | FP32 MB | quantised MB | smaller | int8 products | float products (attention) |")
    print("|---|---|---|---|---|---|")
    before, after = report["size_bytes"]["fp32"], report["size_bytes"]["quantized"]
    for tower, path in open_bundle(Path(report["bundle"]), verify=False).encoders.items():
        kernels = count_kernels(path)
        sizes = f"{before[tower] / 1e6:.1f} | {after[tower] / 1e6:.1f} | {report['size_ratio'][tower]:.2f}x"
        print(f"| {tower} | {sizes} | {kernels['int8']} | {kernels['float']} |")
    total = f"{before['total'] / 1e6:.1f} | {after['total'] / 1e6:.1f} | {report['size_ratio']['total']:.2f}x"
    print(f"| total | {total} | | |")
    steps = ", ".join(f"{name} {value:.0f} s" for name, value in report["seconds"].items())
    bits = report["weight_bits_average"]
    print(
        f"\n{args.model} {args.bits}: {bits:.2f} bits per weight, {seconds:.0f} s ({steps}), peak memory {peak:.2f} GB."
    )


if __name__ == "__main__":
    main()
