"""Learned rounding: the algebra against first principles, the statistics against plain sums, real towers."""

from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir
import pytest
from encoders import material, quantize, reader_of, section_of
from graphs import Feeds, parse, run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.calibration import D4CCalibrationDataReader
from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.errors import GraphError, RecipeError
from d4c_onnx.graph.layers import channels_back, channels_first
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import array, constant, name_of, nodes_by_name
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.inside.statistics import (
    StatisticsCollector,
    fake_quantize,
    new_statistics,
    quantized_name,
)
from d4c_onnx.quantization.inside.views import input_view
from d4c_onnx.quantization.plan import Plan, make_plan
from d4c_onnx.quantization.rounding import METHODS, QuantizedWeight, RoundingTask
from d4c_onnx.quantization.rounding.base import InputMoments, grid_limits
from d4c_onnx.quantization.rounding.corrections import correct_affine, correct_mean
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.layerwise import bias_of
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.regions import find_regions
from d4c_onnx.quantization.rounding.schedule import PUBLISHED, SHORT, AdaRoundSchedule
from d4c_onnx.quantization.sensitivity import LayerCost, measure_costs, spend
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
    learned = GptqRounding(0.01).round(weight, 4, InputMoments(gram, gram))
    nearest = NearestRounding().round(weight, 4)
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
    asymmetric = GptaqRounding(0.01).round(weight, 4, InputMoments(gram, cross))
    symmetric = GptaqRounding(0.01).round(weight, 4, InputMoments(gram, gram))

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
    learned = GptqRounding().round(weight.astype(np.float32), 4, InputMoments(gram, gram))
    assert np.abs(learned.dequantize() - weight).max() < 0.02 * np.abs(weight).max()


def test_inputs_that_never_fire_are_harmless() -> None:
    _, weight, x = _problem(0)
    x[:, 3] = 0
    gram = x.T @ x / len(x)
    learned = GptaqRounding().round(weight, 4, InputMoments(gram, gram))
    assert np.isfinite(learned.dequantize()).all()
    zero = GptaqRounding().round(weight, 4, InputMoments(np.zeros_like(gram), np.zeros_like(gram)))
    assert np.isfinite(zero.dequantize()).all()


@pytest.mark.parametrize("name", ["magic", "", "GPTQ"])
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="gptaq"):
        section_of(f"rounding={name or chr(39) * 2}")


def test_recipes_know_the_methods() -> None:
    for name in METHODS:
        assert section_of(f"rounding={name}").rounding_method == name
    assert section_of().rounding_method in METHODS
    assert METHODS["adaround"] == Reconstruction(SHORT)
    assert METHODS["adaround-published"] == Reconstruction(PUBLISHED)


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
    text = f"""g (float[2, 4, 7, 8] x) => (float[a, b, c, d] y) {{
        [conv] y = Conv<group = {groups}, kernel_shape = {[kernel] * 2}, strides = {[stride] * 2}, pads = {[pad] * 4},
                        dilations = {[dilation] * 2}>(x, w)
    }}"""
    model = parse(text, w=weight)
    expected = run(model, x)
    rows = input_view(nodes_by_name(model.graph)["conv"], weight.shape, "x").rows(x)
    parts = np.split(weight.reshape(8, -1), groups)
    got = np.concatenate([row @ part.T for row, part in zip(rows, parts, strict=True)], axis=1)
    batch, channels, height, width = expected.shape
    assert np.allclose(got.reshape(batch, height, width, channels).transpose(0, 3, 1, 2), expected, atol=1e-4)


def _prepared(request: pytest.FixtureRequest, mini: str, *keys: str, tower: str = "image", batch: int = 8) -> Any:
    """Model, plan, ranges and calibration data of a tower, as the rounding gets them."""
    bundle, dataset = material(request, mini)
    model, section = load_model(bundle.encoders[tower]), section_of(*keys)
    reader = D4CCalibrationDataReader(dataset, batch) if tower == "image" else reader_of(tower, dataset)
    plan = make_plan(model.graph, section)
    return model, plan, collect_ranges(model, plan, reader, section), reader


def _values(model: ir.Model, reader: Any, name: str) -> np.ndarray:
    return np.concatenate([batch[name] for batch in SegmentedEncoder(model, reader).advance([name])])


def test_statistics_are_plain_sums(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = _prepared(request, "vit", batch=3)
    layer = plan.layers[5]  # c_fc of the first block: behind attention, so the errors before it count
    collector = StatisticsCollector(model, plan, ranges, reader)
    found = collector.collect([layer])[layer.node]
    assert len(material(request, "vit")[1].pixel_values) == 8
    x = _values(model, reader, layer.data).reshape(-1, found.gram.shape[1]).astype(np.float64)
    assert found.count == len(x)
    mean, mean_quantized = found.means()
    assert np.allclose(mean[0], x.mean(0), atol=1e-5)
    assert 0 < np.abs(mean_quantized - mean).max() < 0.2
    gram, _ = found.covariances()
    expected = np.cov(x.T, bias=True)
    assert np.abs(gram[0] - expected).max() < 0.2 * np.abs(expected).max()


def test_twin_rounds_activations_to_their_grid(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = _prepared(request, "vit", "bits=w4a4")
    values = _values(fake_quantize(model, plan, ranges), reader, quantized_name(plan.layers[1].data))
    assert len(np.unique(values)) <= 16


def test_a_twin_shares_its_models_weights_until_they_are_replaced(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = _prepared(request, "vit")
    before = snapshot(model)
    layer = plan.layers[2]
    twin = fake_quantize(model, plan, ranges)
    for name, value in model.graph.initializers.items():
        assert twin.graph.initializers[name].const_value is value.const_value
    shared, changed = (SegmentedEncoder(twin, reader) for _ in range(2))
    changed.replace(layer.weight, 2 * constant(model.graph.initializers[layer.weight]))
    for got, doubled in zip(*(part.advance([layer.output]) for part in (shared, changed)), strict=True):
        assert np.allclose(2 * got[layer.output], doubled[layer.output], rtol=1e-4, atol=1e-5)
    assert snapshot(model) == before
    assert np.array_equal(
        constant(twin.graph.initializers[layer.weight]), constant(model.graph.initializers[layer.weight])
    )


@pytest.mark.parametrize("model", ["vit", "rn"])
@pytest.mark.parametrize("weights", ["in memory", "beside the graph"])
def test_segments_end_where_the_whole_encoder_ends(
    model: str, weights: str, request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Cut at every weighted layer, the pieces give the very answer of the whole."""
    bundle, _ = material(request, model)
    height, width = bundle.manifest.preprocess.size
    pixels = np.random.default_rng(0).standard_normal((3, 3, height, width)).astype(np.float32)
    encoder = load_model(bundle.image_encoder)
    before = snapshot(encoder)
    if weights == "beside the graph":  # as those of a large encoder
        monkeypatch.setattr("d4c_onnx.graph.model.weight_bytes", lambda _: 2**32)
    pieces = SegmentedEncoder(encoder, Feeds([pixels[:2], pixels[2:]], "pixel_values"))
    for layer in make_plan(encoder.graph, section_of()).layers:
        assert all(layer.data in values for values in pieces.advance([layer.data]))
    got = np.concatenate([values["image_embeds"] for values in pieces.advance(["image_embeds"])])
    assert np.allclose(got, EncoderSession(bundle.image_encoder).run(pixels), atol=1e-5)
    assert snapshot(encoder) == before


def test_bias_correction_restores_the_mean_output(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = _prepared(request, "vit")
    task = RoundingTask(model, plan, ranges, reader, correction="bias")
    before = snapshot(model)
    rounded = METHODS["nearest"].round_weights(task)
    assert snapshot(model) == before
    layer = plan.layers[1]
    bias = bias_of(nodes_by_name(model.graph)[layer.node])
    assert bias is not None
    assert name_of(bias) in rounded.biases
    found = StatisticsCollector(model, plan, ranges, reader).collect([layer])[layer.node]
    mean, mean_quantized = (value[0] for value in found.means())
    weight = constant(model.graph.initializers[layer.weight]).T.astype(np.float64)
    exact = weight @ mean + constant(bias)
    after = rounded.weights[layer.weight].dequantize() @ mean_quantized + rounded.biases[name_of(bias)]
    assert np.allclose(exact, after, atol=1e-5)


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
    rounded = NearestRounding().round(weight, 4)
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


def test_regions_are_bottlenecks_and_single_layers(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, _ = _prepared(request, "rn")
    regions = find_regions(fake_quantize(model, plan, ranges).graph, plan.layers)
    assert sorted(len(region.layers) for region in regions) == [1] * 7 + [4] * 4  # stem and pool; one per stage
    assert {layer.node for region in regions for layer in region.layers} == {layer.node for layer in plan.layers}
    model, plan, ranges, _ = _prepared(request, "vit")
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


def test_what_adaround_learns_of_a_bottleneck_holds_in_onnxruntime(request: pytest.FixtureRequest) -> None:
    """Torch must compute what the twin does, pads, strides and residual included, or it would learn something else."""
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    model, plan, ranges, reader = _prepared(request, "rn")
    twin = fake_quantize(model, plan, ranges)
    region = next(part for part in find_regions(twin.graph, plan.layers) if len(part.layers) == 4)
    weights = {}
    for layer in region.layers:
        values = constant(model.graph.initializers[layer.weight])
        weights[layer.weight] = channels_first(values, layer.channel_axis), values.shape, layer.channel_axis, 4
    read = {value for entry in region.nodes for value in entry.inputs if value is not None}
    fixed = {name_of(value): found for value in read if (found := array(value)) is not None}
    source, target = (_values(part, reader, name) for part, name in ((twin, region.input), (model, region.output)))
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
    nearest = {name: NearestRounding().round(rows, 4) for name, (rows, *_) in weights.items()}
    errors = [
        float(np.square(_answer(twin, chosen, plan, reader, region.output) - target).mean())
        for chosen in (learned, nearest)
    ]
    assert errors[0] < 0.7 * errors[1]


def test_pieces_of_the_twin_run_with_the_weights_that_were_placed(request: pytest.FixtureRequest) -> None:
    """onnxruntime would round a Conv's float weight to int8 between DequantizeLinear and QuantizeLinear."""
    model, plan, ranges, reader = _prepared(request, "rn")
    twin = fake_quantize(model, plan, ranges)
    layer = plan.layers[4]
    name, conv = quantized_name(layer.data), nodes_by_name(twin.graph)[layer.node]
    weight, bias = constant(twin.graph.initializers[layer.weight]), constant(conv.inputs[2])
    for batch in list(SegmentedEncoder(twin, reader).advance([name, layer.output])):
        rows = input_view(conv, weight.shape, name).rows(batch[name])[0]
        got = rows @ weight.reshape(len(weight), -1).T + bias
        kept = batch[layer.output].transpose(0, 2, 3, 1).reshape(-1, len(weight))
        assert np.allclose(got, kept, atol=1e-4)


def test_adaround_beats_nearest_on_its_layer_and_stays_between_the_neighbours() -> None:
    from d4c_onnx.quantization.rounding.adaround import reconstruct

    _, weight, x = _problem(3)
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
    nearest = NearestRounding().round(weight, 4)
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


def test_measured_costs_name_every_layer_and_only_4_bit_ones_hurt(request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    model = load_model(bundle.text_encoder)
    before = snapshot(model)
    plan = make_plan(model.graph, section_of())
    costs = measure_costs("text", model, plan, reader_of("text", dataset))
    assert [cost.node for cost in costs] == [*(layer.node for layer in plan.layers), *plan.float16]
    assert all((cost.error > 0) == (cost.bits < 5) for cost in costs)
    assert snapshot(model) == before  # nothing was left behind in the graph


METHODS_IN_SHORT = {**METHODS, "adaround": Reconstruction(AdaRoundSchedule(3, 0.01))}
del METHODS_IN_SHORT["adaround-published"]  # the same method, for longer


@pytest.mark.parametrize("correction", ["none", "bias", "affine"])
@pytest.mark.parametrize("name", METHODS_IN_SHORT)
def test_every_method_rounds_every_weight_onto_its_grid(
    name: str, correction: str, request: pytest.FixtureRequest
) -> None:
    if name == "adaround" and correction != "none":
        with pytest.raises(RecipeError, match="adaround"):
            section_of(f"rounding={name}", f"correction={correction}")
        return
    model, plan, ranges, reader = _prepared(request, "vit", tower="text")
    before, told = snapshot(model), []
    task = RoundingTask(model, plan, ranges, reader, correction, on_step=lambda *step: told.append(step[:3]))
    made = METHODS_IN_SHORT[name].round_weights(task)
    assert snapshot(model) == before
    assert set(made.weights) == {layer.weight for layer in plan.layers}
    for layer in plan.layers:
        weight, values = made.weights[layer.weight], constant(model.graph.initializers[layer.weight])
        rows = channels_first(values, layer.channel_axis)
        assert weight.num_bits == plan.weight_bits[layer.weight]
        assert weight.integers.dtype == np.int8
        assert weight.integers.shape == rows.shape
        low, high = grid_limits(weight.num_bits)
        assert low <= weight.integers.min() <= weight.integers.max() <= high
        assert weight.scale.dtype == np.float32
        assert weight.scale.shape == (len(rows),)
        assert (weight.scale > 0).all()
        if name in ("nearest", "adaround") and correction != "affine":  # others repair what few prompts happen to show
            assert np.abs(weight.dequantize() - rows).mean() < 0.2 * np.abs(rows).mean()
    biases = {name_of(bias) for layer in plan.layers if (bias := bias_of(nodes_by_name(model.graph)[layer.node]))}
    assert set(made.biases) == (biases if correction != "none" else set())
    assert told[-1] == ("round", told[-1][2], told[-1][2])  # whoever waits sees the end
    assert [done for _, done, _ in told] == list(range(1, len(told) + 1))


@pytest.mark.parametrize("name", METHODS_IN_SHORT)
def test_rounding_with_float_activations_needs_no_ranges(name: str, request: pytest.FixtureRequest) -> None:
    """Weights only: x^ carries the errors of weights alone."""
    model, plan, ranges, reader = _prepared(request, "vit", "bits=w4a16", "target=cuda", tower="text")
    assert ranges == {}
    made = METHODS_IN_SHORT[name].round_weights(RoundingTask(model, plan, ranges, reader))
    assert set(made.weights) == {layer.weight for layer in plan.layers}
    assert {weight.num_bits for weight in made.weights.values()} == {4, 7}


@pytest.mark.parametrize("name", METHODS_IN_SHORT)
def test_a_weight_that_two_layers_share_is_rounded_once(name: str) -> None:
    rng = np.random.default_rng(0)
    text = "g (float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w)\n b = Relu(a)\n c = MatMul(b, w)\n y = Neg(c) }"
    model = parse(text, w=rng.standard_normal((8, 8)))
    reader, section = Feeds([rng.standard_normal((64, 8)).astype(np.float32)]), section_of()
    plan = make_plan(model.graph, section)
    ranges: dict[str, QuantParams] = collect_ranges(model, plan, reader, section)
    made = METHODS_IN_SHORT[name].round_weights(RoundingTask(model, plan, ranges, reader))
    assert set(made.weights) == {"w"}


def test_segments_run_what_branches_read() -> None:
    rng = np.random.default_rng(0)
    text = """g (float[n, 8] x) => (float[n, 8] y) {
        h = MatMul(x, w)
        r = Relu(h)
        total = ReduceSum<keepdims = 0>(x)
        positive = Greater(total, nought)
        s = If (positive) <
            then_branch = inside () => (float[n, 8] one) { half = Mul(h, factor)\n one = Neg(half) },
            else_branch = outside () => (float[n, 8] other) { other = Add(r, r) }
        >
        y = MatMul(s, v)
    }"""
    known = {"w": rng.standard_normal((8, 8)), "v": rng.standard_normal((8, 8)), "factor": np.float32(0.5)}
    model = parse(text, nought=np.float32(0), **known)
    x = np.abs(rng.standard_normal((3, 8))).astype(np.float32)
    reader = Feeds([x, -x])
    for stops in (["h", "r", "s", "y"], ["s", "y"], ["r", "y"]):
        pieces = SegmentedEncoder(model, reader)
        for stop in stops:
            answers = [batch[stop] for batch in pieces.advance([stop])]
        np.testing.assert_allclose(answers[0], run(model, x), rtol=1e-5)
        np.testing.assert_allclose(answers[1], run(model, -x), rtol=1e-5)
    plan = make_plan(model.graph, section_of())
    ranges = collect_ranges(model, plan, reader, section_of())
    for name in METHODS_IN_SHORT:
        made = METHODS_IN_SHORT[name].round_weights(RoundingTask(model, plan, ranges, reader))
        assert set(made.weights) == {"w", "v"}
