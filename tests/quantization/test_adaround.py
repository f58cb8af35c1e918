"""AdaRound: what is learned together, and that it beats nearest rounding in onnxruntime, too."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from encoders import material, prepared, problem, quantize, values_of
from graphs import parse

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import channels_back, channels_first
from d4c_onnx.graph.values import array, constant, name_of
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.inside.statistics import (
    fake_quantize,
)
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding import METHODS, QuantizedWeight
from d4c_onnx.quantization.rounding.base import WeightGrid
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.regions import find_regions
from d4c_onnx.quantization.rounding.schedule import AdaRoundSchedule
from d4c_onnx.runtime.session import EncoderSession


def test_regions_are_bottlenecks_and_single_layers(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, _ = prepared(request, "rn")
    regions = find_regions(fake_quantize(model, plan, ranges).graph, plan.layers)
    assert sorted(len(region.layers) for region in regions) == [1] * 7 + [4] * 4  # stem and pool; one per stage
    assert {layer.node for region in regions for layer in region.layers} == {layer.node for layer in plan.layers}
    model, plan, ranges, _ = prepared(request, "vit")
    regions = find_regions(fake_quantize(model, plan, ranges).graph, plan.layers)
    assert [len(region.layers) for region in regions] == [1] * len(plan.layers)


def _answer(model: ir.Model, weights: dict[str, QuantizedWeight], plan: Plan, reader: Any, name: str) -> np.ndarray:
    """A value of a twin whose weights are on their grids."""
    pieces = SegmentedEncoder(model, reader)
    for layer in plan.layers:
        if layer.weight in weights:
            shape = constant(model.graph.initializers[layer.weight]).shape
            pieces.replace(layer.weight, channels_back(weights[layer.weight].dequantize(), shape, layer.channel_axis))
    return np.concatenate([batch[name] for batch in pieces.advance([name])])


@pytest.mark.slow
def test_what_adaround_learns_of_a_bottleneck_holds_in_onnxruntime(request: pytest.FixtureRequest) -> None:
    """Torch must compute what the twin does, pads, strides and residual included, or it would learn something else."""
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    model, plan, ranges, reader = prepared(request, "rn")
    twin = fake_quantize(model, plan, ranges)
    region = next(part for part in find_regions(twin.graph, plan.layers) if len(part.layers) == 4)
    weights = {}
    for layer in region.layers:
        values = constant(model.graph.initializers[layer.weight])
        weights[layer.weight] = channels_first(values, layer.channel_axis), values.shape, layer.channel_axis, 4
    read = {value for entry in region.nodes for value in entry.inputs if value is not None}
    fixed = {name_of(value): found for value in read if (found := array(value)) is not None}
    source, target = (values_of(part, reader, name) for part, name in ((twin, region.input), (model, region.output)))
    learned = reconstruct(
        region.nodes,
        {name: values for name, values in fixed.items() if name not in weights},
        weights,
        (region.input, source),
        (region.output, target),
        AdaRoundSchedule(steps=120, learning_rate=0.05),
        batch=8,
        seed=0,
    )
    nearest = {name: NearestRounding().round(rows, WeightGrid(4)) for name, (rows, *_) in weights.items()}
    errors = [
        float(np.square(_answer(twin, chosen, plan, reader, region.output) - target).mean())
        for chosen in (learned, nearest)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_adaround_beats_nearest_on_its_layer_and_stays_between_the_neighbours() -> None:
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    _, weight, x = problem(3)
    x = x.astype(np.float32)
    made = reconstruct(
        list(parse("g (float[n, 40] x) => (float[n, 12] y) { y = MatMul(x, w) }", w=weight.T).graph),
        {},
        {"w": (weight, (weight.shape[1], weight.shape[0]), 1, 4)},
        ("x", x),
        ("y", x @ weight.T),
        AdaRoundSchedule(steps=400, learning_rate=0.02),
        batch=200,
        seed=0,
    )["w"]
    nearest = NearestRounding().round(weight, WeightGrid(4))
    assert np.array_equal(made.scale, nearest.scale)
    inside = np.abs(weight / made.scale[:, None]) < 7
    assert (np.abs(made.integers - weight / made.scale[:, None])[inside] <= 1.0001).all()
    errors = [np.square(x @ (rounded.dequantize() - weight).T).mean() for rounded in (made, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_adaround_cannot_run_what_it_does_not_know() -> None:
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    [odd] = parse("g (float[2, 2] x) => (float[2, 2] y) { [odd] y = Sinh(x) }").graph
    weights = {"w": (np.ones((2, 2), np.float32), (2, 2), 1, 4)}
    pair = np.ones((2, 2), np.float32)
    with pytest.raises(GraphError, match=r"odd.*gptaq"):
        reconstruct([odd], {}, weights, ("x", pair), ("y", pair), AdaRoundSchedule(1, 0.1), batch=2, seed=0)


@pytest.mark.slow
def test_adaround_writes_a_file_that_answers_better_than_nearest(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, dataset = material(request, "vit")
    pixels = np.array(dataset.pixel_values)
    expected = EncoderSession(bundle.image_encoder).run(pixels)
    monkeypatch.setitem(METHODS, "adaround", Reconstruction(AdaRoundSchedule(60, 0.1)))
    lost = {}
    for rounding in ("nearest", "adaround"):
        target = tmp_path / f"{rounding}.onnx"
        quantize(bundle.image_encoder, dataset, target, f"rounding={rounding}", "smoothing=none")
        lost[rounding] = 1 - float((EncoderSession(target).run(pixels) * expected).sum(1).mean())
    assert lost["adaround"] < lost["nearest"]
