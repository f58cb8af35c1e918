"""What 8-bit weights of full range do on this processor, and what a reduced range costs: zero-shot accuracy at W8A8.

    python benchmarks/saturation.py exported/mini-vit exported/mini-rn

Each bundle must hold a calibration set (`d4c-onnx quantize` leaves one). x86 without VNNI adds two products of uint8
and int8 in 16 bits; on other processors the last two rows are the same. Prints Markdown.
"""

import argparse
import tempfile
from dataclasses import replace
from pathlib import Path

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.manifest import Session
from d4c_onnx.measure import Machine
from d4c_onnx.measure.accuracy import evaluate
from d4c_onnx.quantization import quantize_bundle_files
from d4c_onnx.recipe_file import load_recipe


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    args = parser.parse_args()
    print("| model | weights | sessions | top-1 difference [95 %] | agreement % | similarity rmse |")
    print("|---|---|---|---|---|---|")
    for path in args.bundles:
        bundle = open_bundle(path)
        data = open_calibration_set(min(path.glob("calibration-*")))
        with tempfile.TemporaryDirectory() as folder:
            made = {}
            for name, reduced in (("7 of 8 bits", "true"), ("8 bits", "false")):
                recipe = load_recipe(None, ["quantization.bits=w8a8", f"quantization.reduce_range={reduced}"])
                made[name] = quantize_bundle_files(bundle, data, Path(folder) / reduced, recipe)
            full = made["8 bits"]
            assert full.manifest.quantization is not None
            quantization = replace(full.manifest.quantization, session=Session())
            plain = Bundle(full.path, replace(full.manifest, quantization=quantization))
            rows = [
                ("7 of 8 bits", "default", made["7 of 8 bits"]),
                ("8 bits", "x64quantprecision", full),
                ("8 bits", "default", plain),
            ]
            report = evaluate([bundle, *(row for *_, row in rows)], load_recipe(), None, Machine("cpu"))
        for (weights, sessions, _), found in zip(rows, report.bundles[1:], strict=True):
            versus = found.versus_first
            assert versus is not None
            top = versus.top1_difference
            assert top is not None
            print(
                f"| {bundle.model_name} | {weights} | {sessions} | {top.points:+.2f} [{top.low:+.2f}, "
                f"{top.high:+.2f}] | {versus.agreement:.2f} | {versus.similarity_rmse:.5f} |",
                flush=True,
            )


if __name__ == "__main__":
    main()
