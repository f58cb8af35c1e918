"""Learned rounding: the algebra against first principles, the statistics against plain sums, one real file."""

import numpy as np
import onnx
import pytest
import torch
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.calibration import D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.errors import GraphError, RecipeError
from d4c_onnx.graph.files import load_graph, weight_bytes, without_weights
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.budget import LayerCost, measure_costs, spend
from d4c_onnx.quantization.corrections import correct_affine, correct_mean
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.ranges import collect_ranges
from d4c_onnx.quantization.regions import find_regions
from d4c_onnx.quantization.rounding import InputMoments, make_rounding
from d4c_onnx.quantization.rounding.base import grid_limits
from d4c_onnx.quantization.segments import SegmentedEncoder
from d4c_onnx.quantization.statistics import (
    StatisticsCollector,
    fake_quantize,
    input_rows,
    new_statistics,
    quantized_name,
)
from d4c_onnx.quantization.weights import bias_name, round_weights
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession


def _problem(seed: int, channels: int = 12, inputs: int = 40, rows: int = 400):
    """A layer with correlated inputs, as real ones are."""
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((rows, inputs)) @ rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    return rng, rng.standard_normal((channels, inputs)).astype(np.float32), x


@given(st.integers(0, 10_000))
@settings(max_examples=25, deadline=None)
def test_gptq_beats_nearest_on_the_layer_output(seed: int) -> None:
    _, weight, x = _problem(seed)
    gram = x.T @ x / len(x)
    learned = make_rounding("gptq", 0.01).round(weight, 4, InputMoments(gram, gram))
    nearest = make_rounding("nearest").round(weight, 4)
    low, high = grid_limits(4)
    assert low <= learned.integers.min()
    assert learned.integers.max() <= high

    def error(rounded) -> float:
        return float(np.square(x @ (rounded.dequantize() - weight).T).mean())

    assert error(learned) < error(nearest)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_asymmetric_target_repairs_the_input_error(seed: int) -> None:
    """x^ misses part of x: the weights must make up for it. Compared with rounding that only knows x^."""
    rng, weight, x = _problem(seed)
    seen = x + 0.3 * rng.standard_normal(x.shape)
    seen[:, :5] *= 0.6
    gram, cross = seen.T @ seen / len(x), x.T @ seen / len(x)
    asymmetric = make_rounding("gptaq", 0.01).round(weight, 4, InputMoments(gram, cross))
    symmetric = make_rounding("gptaq", 0.01).round(weight, 4, InputMoments(gram, gram))

    def error(rounded) -> float:
        return float(np.square(x @ weight.T - seen @ rounded.dequantize().T).mean())

    assert error(asymmetric) < error(symmetric)


def test_gptq_leaves_a_grid_weight_alone() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-7, 8, (6, 32)).astype(np.int8)
    integers[:, 0] = 7
    weight = integers * rng.uniform(0.1, 1, 6).astype(np.float32)[:, None]
    x = rng.standard_normal((200, 32))
    gram = x.T @ x / 200
    learned = make_rounding("gptq").round(weight.astype(np.float32), 4, InputMoments(gram, gram))
    assert np.abs(learned.dequantize() - weight).max() < 0.02 * np.abs(weight).max()


def test_inputs_that_never_fire_are_harmless() -> None:
    _, weight, x = _problem(0)
    x[:, 3] = 0
    gram = x.T @ x / len(x)
    learned = make_rounding("gptaq").round(weight, 4, InputMoments(gram, gram))
    assert np.isfinite(learned.dequantize()).all()
    zero = make_rounding("gptaq").round(weight, 4, InputMoments(np.zeros_like(gram), np.zeros_like(gram)))
    assert np.isfinite(zero.dequantize()).all()


@pytest.mark.parametrize("name", ["magic", "", "GPTQ"])
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="gptaq"):
        make_rounding(name)


@given(
    st.sampled_from([1, 2, 4]),
    st.integers(1, 3),
    st.integers(1, 2),
    st.integers(0, 2),
    st.integers(1, 2),
)
@settings(max_examples=25, deadline=None)
def test_patches_times_weight_is_the_convolution(
    groups: int, kernel: int, stride: int, pad: int, dilation: int
) -> None:
    """Grouped, strided, padded, dilated: the rows that the statistics see are those the kernel multiplies."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((2, 4, 7, 8)).astype(np.float32)
    weight = rng.standard_normal((8, 4 // groups, kernel, kernel)).astype(np.float32)
    node = helper.make_node(
        *("Conv", ["x", "w"], ["y"]),
        group=groups,
        kernel_shape=[kernel] * 2,
        strides=[stride] * 2,
        pads=[pad] * 4,
        dilations=[dilation] * 2,
    )
    values = [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in "xy"]
    values[0] = helper.make_tensor_value_info("x", TensorProto.FLOAT, list(x.shape))
    graph = helper.make_graph([node], "g", values[:1], values[1:], [numpy_helper.from_array(weight, "w")])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    expected = EncoderSession(model.SerializeToString()).run(x)
    rows = input_rows(x, node, weight.shape)
    parts = np.split(weight.reshape(8, -1), groups)
    got = np.concatenate([row @ part.T for row, part in zip(rows, parts, strict=True)], axis=1)
    batch, channels, height, width = expected.shape
    assert np.allclose(got.reshape(batch, height, width, channels).transpose(0, 3, 1, 2), expected, atol=1e-4)


def test_statistics_are_plain_sums(vit_bundle, vit_calibration) -> None:
    model = load_graph(vit_bundle.image_encoder)
    section = load_recipe(None).quantization
    reader = D4CCalibrationDataReader(vit_calibration[0], batch=3)
    plan = make_plan(model.graph, section)
    ranges = collect_ranges(model, plan, reader, section)
    layer = plan.layers[5]  # c_fc of the first block: behind attention, so the errors before it count
    collector = StatisticsCollector(model, plan, ranges, reader)
    found = collector.collect([layer])[layer.data]
    pixels = np.array(vit_calibration[1].pixel_values)
    assert len(pixels) == 8
    batches = SegmentedEncoder(model, reader).advance([layer.data])
    x = np.concatenate([batch[layer.data] for batch in batches]).reshape(-1, found.gram.shape[1]).astype(np.float64)
    assert found.count == len(x)
    mean, mean_quantized = found.means()
    assert np.allclose(mean[0], x.mean(0), atol=1e-5)
    assert 0 < np.abs(mean_quantized - mean).max() < 0.2
    gram, _ = found.covariances()
    expected = np.cov(x.T, bias=True)
    assert np.abs(gram[0] - expected).max() < 0.2 * np.abs(expected).max()


def test_twin_rounds_activations_to_their_grid(vit_bundle, vit_calibration) -> None:
    model = load_graph(vit_bundle.image_encoder)
    section = load_recipe(None, ["quantization.bits=w4a4"]).quantization
    reader = D4CCalibrationDataReader(vit_calibration[0])
    plan = make_plan(model.graph, section)
    ranges = collect_ranges(model, plan, reader, section)
    name = quantized_name(plan.layers[1].data)
    twin = SegmentedEncoder(fake_quantize(model, plan, ranges), reader)
    values = np.concatenate([batch[name] for batch in twin.advance([name])])
    assert len(np.unique(values)) <= 16


def test_a_twin_shares_its_models_weights_until_they_are_replaced(vit_bundle, vit_calibration) -> None:
    model, _, reader, plan, ranges = _twin(vit_bundle, vit_calibration[0])
    before = model.SerializeToString()
    layer = plan.layers[2]
    names = [layer.output]
    whole = SegmentedEncoder(fake_quantize(model, plan, ranges), reader)
    shell = fake_quantize(without_weights(model), plan, ranges)
    assert weight_bytes(shell) < 0.01 * weight_bytes(model)
    shared, changed = (SegmentedEncoder(shell, reader, weights=model) for _ in range(2))
    changed.replace(layer.weight, 2 * GraphIndex(model.graph).array(layer.weight))
    for expected, got, doubled in zip(*(part.advance(names) for part in (whole, shared, changed)), strict=True):
        assert np.array_equal(expected[layer.output], got[layer.output])
        assert np.allclose(2 * got[layer.output], doubled[layer.output], rtol=1e-4, atol=1e-5)
    assert model.SerializeToString() == before


@pytest.mark.parametrize("bundle", ["vit_bundle", "rn_bundle"])
def test_segments_end_where_the_whole_encoder_ends(bundle: str, request: pytest.FixtureRequest) -> None:
    """Cut at every weighted layer, the pieces give the very answer of the whole."""
    path = request.getfixturevalue(bundle).image_encoder
    model = load_graph(path)
    size = 48 if bundle == "vit_bundle" else 64
    pixels = np.random.default_rng(0).standard_normal((3, 3, size, size)).astype(np.float32)
    batches = [{"pixel_values": pixels[:2]}, {"pixel_values": pixels[2:]}]

    class Reader(D4CCalibrationDataReader):
        def __init__(self) -> None:
            self._left = iter(batches)

        def rewind(self) -> None:
            self._left = iter(batches)

        def get_next(self):
            return next(self._left, None)

    pieces = SegmentedEncoder(model, Reader())
    for layer in make_plan(model.graph, load_recipe(None).quantization).layers:
        assert all(layer.data in values for values in pieces.advance([layer.data]))
    got = np.concatenate([values["image_embeds"] for values in pieces.advance(["image_embeds"])])
    assert np.allclose(got, EncoderSession(path).run(pixels), atol=1e-5)


def test_bias_correction_restores_the_mean_output(vit_bundle, vit_calibration) -> None:
    model = load_graph(vit_bundle.image_encoder)
    section = load_recipe(None, ["quantization.correction=bias", "quantization.rounding=nearest"]).quantization
    reader = D4CCalibrationDataReader(vit_calibration[0])
    plan = make_plan(model.graph, section)
    ranges = collect_ranges(model, plan, reader, section)
    rounded = round_weights(model, plan, ranges, reader, section)
    index = GraphIndex(model.graph)
    layer = plan.layers[1]
    name = bias_name(index, layer)
    assert name in rounded.biases
    found = StatisticsCollector(model, plan, ranges, reader).collect([layer])[layer.data]
    mean, mean_quantized = (value[0] for value in found.means())
    weight = index.array(layer.weight).T.astype(np.float64)
    before = weight @ mean + index.array(name)
    after = rounded.weights[layer.weight].dequantize() @ mean_quantized + rounded.biases[str(name)]
    assert np.allclose(before, after, atol=1e-5)
    assert onnx.checker.check_model(model) is None


@given(st.integers(0, 10_000), st.booleans())
@settings(max_examples=20, deadline=None)
def test_affine_correction_is_the_best_gain_and_offset(seed: int, with_bias: bool) -> None:
    """No other gain or offset has a smaller error on the rows it was fitted on; bias correction lies between."""
    rng, weight, x = _problem(seed)
    x = x + 0.5
    seen = x + 0.2 * rng.standard_normal(x.shape)
    found = new_statistics(1, x.shape[1])
    found.add(x[None].astype(np.float32), seen[None].astype(np.float32))
    found.flush()
    rounded = make_rounding("nearest").round(weight, 4)
    bias = rng.standard_normal(len(weight)).astype(np.float32) if with_bias else None
    zero = np.zeros(len(weight), np.float32)
    own = bias if bias is not None else zero
    affine, offset = correct_affine(weight, rounded, bias, found)
    assert np.array_equal(affine.integers, rounded.integers)
    assert (offset is None) == (bias is None)

    def error(candidate, shift) -> np.ndarray:
        return np.square(x @ weight.T + own - seen @ candidate.dequantize().T - shift).mean(0)

    best = error(affine, offset if offset is not None else zero)
    assert (best <= error(rounded, own) + 1e-5).all()
    if bias is not None:
        shifted = correct_mean(weight, rounded, bias, found)
        assert (best <= error(rounded, shifted) + 1e-5).all()
        assert (error(rounded, shifted) <= error(rounded, own) + 1e-5).all()


def _twin(bundle, calibration, *sets: str):
    model = load_graph(bundle.image_encoder)
    section = load_recipe(None, [f"quantization.{item}" for item in sets]).quantization
    reader = D4CCalibrationDataReader(calibration)
    plan = make_plan(model.graph, section)
    ranges = collect_ranges(model, plan, reader, section)
    return model, section, reader, plan, ranges


def test_regions_are_bottlenecks_and_single_layers(vit_bundle, vit_calibration, rn_bundle, rn_calibration) -> None:
    model, _, _, plan, ranges = _twin(rn_bundle, rn_calibration)
    regions = find_regions(fake_quantize(model, plan, ranges).graph, plan.layers)
    assert sorted(len(region.layers) for region in regions) == [1] * 7 + [4] * 4  # stem and pool; one per stage
    assert {layer.node for region in regions for layer in region.layers} == {layer.node for layer in plan.layers}
    model, _, _, plan, ranges = _twin(vit_bundle, vit_calibration[0])
    regions = find_regions(fake_quantize(model, plan, ranges).graph, plan.layers)
    assert [len(region.layers) for region in regions] == [1] * len(plan.layers)


def test_a_region_in_torch_is_the_region_in_onnxruntime(rn_bundle, rn_calibration) -> None:
    """With weights that lie on their grid already, AdaRound's forward pass must give the twin's own output."""
    from d4c_onnx.quantization.rounding import adaround

    model, _, reader, plan, ranges = _twin(rn_bundle, rn_calibration)
    twin = fake_quantize(model, plan, ranges)
    region = next(part for part in find_regions(twin.graph, plan.layers) if len(part.layers) == 4)
    inputs = np.concatenate([b[region.input] for b in SegmentedEncoder(twin, reader).advance([region.input])])
    expected = np.concatenate([b[region.output] for b in SegmentedEncoder(twin, reader).advance([region.output])])
    index = GraphIndex(twin.graph)
    values = {
        name: torch.from_numpy(index.array(name).copy())
        for node in region.nodes
        for name in node.input
        if name in index.initializers
    }
    values[region.input] = torch.from_numpy(inputs)
    for node in region.nodes:
        values[node.output[0]] = adaround._run(node, [values[name] for name in node.input])
    got = values[region.output].numpy()
    # a value on the border between two levels may fall either way
    assert np.abs(got - expected).mean() < 0.001 * np.abs(expected).mean()


def test_pieces_of_the_twin_run_with_the_weights_that_were_placed(rn_bundle, rn_calibration) -> None:
    """onnxruntime would round a Conv's float weight to int8 between DequantizeLinear and QuantizeLinear."""
    model, _, reader, plan, ranges = _twin(rn_bundle, rn_calibration)
    twin = fake_quantize(model, plan, ranges)
    layer = plan.layers[4]
    name, node = quantized_name(layer.data), GraphIndex(twin.graph).producer[layer.output]
    weight = GraphIndex(twin.graph).array(layer.weight)
    values = list(SegmentedEncoder(twin, reader).advance([name, layer.output]))
    for batch in values:
        rows = input_rows(batch[name], node, weight.shape)[0]
        got = rows @ weight.reshape(len(weight), -1).T + GraphIndex(twin.graph).array(node.input[2])
        kept = batch[layer.output].transpose(0, 2, 3, 1).reshape(-1, len(weight))
        assert np.allclose(got, kept, atol=1e-4)


def test_adaround_beats_nearest_on_its_layer_and_stays_between_the_neighbours() -> None:
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    _, weight, x = _problem(3)
    x = x.astype(np.float32)
    node = helper.make_node("MatMul", ["x", "w"], ["y"], name="layer")
    made = reconstruct(
        [node],
        {},
        {"w": (weight, (weight.shape[1], weight.shape[0]), 1, 4)},
        ("x", x),
        ("y", x @ weight.T),
        steps=400,
        learning_rate=0.02,
        batch=200,
        seed=0,
    )["w"]
    nearest = make_rounding("nearest").round(weight, 4)
    assert np.array_equal(made.scale, nearest.scale)
    inside = np.abs(weight / made.scale[:, None]) < 7
    assert (np.abs(made.integers - weight / made.scale[:, None])[inside] <= 1.0001).all()
    errors = [np.square(x @ (rounded.dequantize() - weight).T).mean() for rounded in (made, nearest)]
    assert errors[0] < 0.8 * errors[1]


def test_adaround_cannot_run_what_it_does_not_know() -> None:
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    node = helper.make_node("Softmax", ["x"], ["y"], name="odd")
    weights = {"w": (np.ones((2, 2), np.float32), (2, 2), 1, 4)}
    pair = np.ones((2, 2), np.float32)
    with pytest.raises(GraphError, match="gptaq"):
        reconstruct([node], {}, weights, ("x", pair), ("y", pair), steps=1, learning_rate=0.1, batch=2, seed=0)


@pytest.mark.slow
def test_adaround_writes_a_file_that_answers_better_than_nearest(vit_bundle, vit_calibration, tmp_path) -> None:
    pixels = np.array(vit_calibration[1].pixel_values)
    expected = EncoderSession(vit_bundle.image_encoder).run(pixels)
    lost = {}
    for rounding in ("nearest", "adaround"):
        sets = [f"quantization.rounding={rounding}", "quantization.adaround_steps=60", "quantization.smoothing=none"]
        section = load_recipe(None, [*sets, "quantization.adaround_learning_rate=0.1"]).quantization
        target = tmp_path / f"{rounding}.onnx"
        quantize_encoder(vit_bundle.image_encoder, target, D4CCalibrationDataReader(vit_calibration[0]), section)
        lost[rounding] = 1 - float((EncoderSession(target).run(pixels) * expected).sum(1).mean())
    assert lost["adaround"] < lost["nearest"]


def test_budget_buys_the_layers_with_the_largest_error_per_weight() -> None:
    costs = [
        LayerCost("image", "first", 100, 8, 0.0),
        LayerCost("image", "a", 400, 4, 4.0),
        LayerCost("image", "b", 400, 4, 1.0),
        LayerCost("text", "c", 100, 4, 2.0),
    ]
    base = (100 * 8 + 900 * 4) / 1000
    assert spend(costs, base) == {"image": frozenset(), "text": frozenset()}
    assert spend(costs, base + 0.4) == {"image": frozenset(), "text": frozenset({"c"})}
    assert spend(costs, base + 2.0) == {"image": frozenset({"a"}), "text": frozenset({"c"})}
    assert spend(costs, 8) == {"image": frozenset({"a", "b"}), "text": frozenset({"c"})}
    with pytest.raises(RecipeError, match="boundary_bits"):
        spend(costs, base - 0.1)


def test_measured_costs_name_every_layer_and_only_4_bit_ones_hurt(vit_bundle, vit_calibration) -> None:
    model = load_graph(vit_bundle.text_encoder)
    plan = make_plan(model.graph, load_recipe(None).quantization)
    costs = measure_costs("text", model, plan, PromptCalibrationDataReader(vit_calibration[0]))
    assert [cost.node for cost in costs] == [layer.node for layer in plan.layers]
    assert all((cost.error > 0) == (cost.bits == 4) for cost in costs)
    assert load_graph(vit_bundle.text_encoder) == model  # nothing was left behind in the graph
