"""Rounding methods on the same layers of a full-size architecture: output error, seconds, peak memory.

    python benchmarks/rounding.py ViT-B-32 -o DIR --adaround-steps 300

The layers are those of the first transformer block; x is what reaches them in float, x^ the same rounded to its uint8
grid. The error is E |W x - W^ x^|^2 / E |W x|^2 over 128 noise images: random weights have nothing to synthesise from,
and what is compared is how far each method gets on the same data and how long it takes. AdaRound's seconds for the
published 20,000 steps are its seconds per step times 20,000. Prints Markdown.
"""

import argparse
import resource
import time
from dataclasses import replace
from pathlib import Path

import numpy as np

from d4c_onnx import pipeline
from d4c_onnx.calibration import D4CCalibrationDataReader
from d4c_onnx.graph.layers import channels_first
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import constant, nodes_by_name
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.inside.statistics import fake_quantize, quantized_name
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding.adaround import reconstruct
from d4c_onnx.quantization.rounding.base import InputMoments, LayerRounding, QuantizedWeight, WeightGrid
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.schedule import PUBLISHED, SHORT
from d4c_onnx.recipe_file import load_recipe

METHODS: dict[str, LayerRounding] = {"nearest": NearestRounding(), "gptq": GptqRounding(), "gptaq": GptaqRounding()}


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("model", nargs="?", default="ViT-B-32")
    parser.add_argument("-o", "--output", type=Path, required=True)
    parser.add_argument("--layers", type=int, default=6, help="weighted layers after the first one")
    parser.add_argument("--adaround-steps", type=int, default=1000)
    args = parser.parse_args()
    recipe = load_recipe(None, ["synthesis.method=noise"])
    folder, _ = pipeline.synthesize_calibration_set(args.model, recipe, output=args.output, pretrained="random")
    model = load_model(folder.parent / "image_encoder.onnx")
    plan = make_plan(model.graph, recipe.quantization)
    reader = D4CCalibrationDataReader(folder)
    ranges = collect_ranges(model, plan, reader, recipe.quantization)
    twin = SegmentedEncoder(fake_quantize(model, plan, ranges), reader)
    plain, nodes = SegmentedEncoder(model, reader), nodes_by_name(twin.graph)
    print("| layer | weight | method | error | seconds | published schedule, seconds |")
    print("|---|---|---|---|---|---|")
    for layer in plan.layers[1 : 1 + args.layers]:
        name = quantized_name(layer.data)
        x, seen = (
            np.concatenate([batch[value].reshape(-1, batch[value].shape[-1]) for batch in pieces.advance([value])])
            for pieces, value in ((plain, layer.data), (twin, name))
        )
        stored = constant(model.graph.initializers[layer.weight])
        weight = channels_first(stored, layer.channel_axis)
        target = x @ weight.T
        power = float(np.square(target).sum(dtype=np.float64))

        def error(
            rounded: QuantizedWeight, seen: np.ndarray = seen, target: np.ndarray = target, power: float = power
        ) -> float:
            return float(np.square(target - seen @ rounded.dequantize().T).sum(dtype=np.float64)) / power

        for method in ("nearest", "gptq", "gptaq", "adaround"):
            start = time.perf_counter()
            if method == "adaround":
                rounded = reconstruct(
                    [nodes[layer.node]],
                    {},
                    {layer.weight: (weight, stored.shape, layer.channel_axis, 4)},
                    (name, seen),
                    (layer.output, target),
                    replace(SHORT, steps=args.adaround_steps),
                    batch=SHORT.batch * len(seen) // recipe.synthesis.images,
                    seed=0,
                )[layer.weight]
            else:
                gram = seen.T @ seen / len(seen)
                cross = x.T @ seen / len(x) if method == "gptaq" else gram
                moments = InputMoments(gram.astype(np.float64), cross.astype(np.float64))
                rounded = METHODS[method].round(weight, WeightGrid(4), moments)
            seconds = time.perf_counter() - start
            published = f"{seconds / args.adaround_steps * PUBLISHED.steps:.0f}" if method == "adaround" else ""
            label = f"adaround, {args.adaround_steps} steps" if method == "adaround" else method
            row = [layer.node, "x".join(str(size) for size in weight.shape), label]
            print(f"| {' | '.join(row)} | {error(rounded):.5f} | {seconds:.1f} | {published} |", flush=True)
    print(f"\npeak memory {resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1e6:.2f} GB")


if __name__ == "__main__":
    main()
