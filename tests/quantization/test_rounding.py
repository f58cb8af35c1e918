"""Learned rounding: the algebra against first principles, corrections, and every method on real towers."""

from itertools import cycle

import numpy as np
import pytest
from encoders import METHODS_IN_SHORT, config_of, prepared, problem
from graphs import Feeds, parse, run, snapshot
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.layers import channels_first
from d4c_onnx.graph.trellis import TOP
from d4c_onnx.graph.values import constant, name_of, nodes_by_name
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.statistics import (
    StatisticsCollector,
    new_statistics,
)
from d4c_onnx.quantization.inside.views import input_view
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding import METHODS, RoundingTask
from d4c_onnx.quantization.rounding.base import InputMoments, WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.corrections import correct_affine, correct_mean
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.layerwise import bias_of
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.schedule import PUBLISHED, SHORT


@pytest.mark.parametrize("grid", [WeightGrid(4), WeightGrid(4, 16)], ids=["channels", "groups"])
@given(seed=st.integers(0, 10_000))
@settings(max_examples=20, deadline=None)
def test_gptq_beats_nearest_on_the_layer_output(seed: int, grid: WeightGrid) -> None:
    _, weight, x = problem(seed, inputs=64)
    gram = x.T @ x / len(x)
    learned = GptqRounding(0.01).round(weight, grid, InputMoments(gram, gram))
    nearest = NearestRounding().round(weight, grid)
    low, high = (-TOP, TOP) if grid.group_size else grid_limits(4)
    assert low <= learned.integers.min()
    assert learned.integers.max() <= high

    def error(rounded) -> float:
        return float(np.square(x @ (rounded.dequantize() - weight).T).mean())

    assert error(learned) < error(nearest)


@given(st.integers(0, 10_000))
@settings(max_examples=15, deadline=None)
def test_asymmetric_target_repairs_the_input_error(seed: int) -> None:
    """x^ misses part of x: the weights must make up for it. Compared with rounding that only knows x^."""
    rng, weight, x = problem(seed)
    seen = x + 0.3 * rng.standard_normal(x.shape)
    seen[:, :5] *= 0.6
    gram, cross = seen.T @ seen / len(x), x.T @ seen / len(x)
    asymmetric = GptaqRounding(0.01).round(weight, WeightGrid(4), InputMoments(gram, cross))
    symmetric = GptaqRounding(0.01).round(weight, WeightGrid(4), InputMoments(gram, gram))

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
    learned = GptqRounding().round(weight.astype(np.float32), WeightGrid(4), InputMoments(gram, gram))
    assert np.abs(learned.dequantize() - weight).max() < 0.02 * np.abs(weight).max()


def test_inputs_that_never_fire_are_harmless() -> None:
    _, weight, x = problem(0)
    x[:, 3] = 0
    gram = x.T @ x / len(x)
    learned = GptaqRounding().round(weight, WeightGrid(4), InputMoments(gram, gram))
    assert np.isfinite(learned.dequantize()).all()
    zero = GptaqRounding().round(weight, WeightGrid(4), InputMoments(np.zeros_like(gram), np.zeros_like(gram)))
    assert np.isfinite(zero.dequantize()).all()


@pytest.mark.parametrize("name", ["magic", "", "GPTQ"])
def test_unknown_methods_are_refused(name: str) -> None:
    with pytest.raises(RecipeError, match="gptaq"):
        config_of(f"rounding={name or chr(39) * 2}")


def test_recipes_know_the_methods() -> None:
    for name in METHODS:
        config = config_of(f"rounding={name}")
        assert config.rounding_method == name
        assert config.learns == isinstance(METHODS[name], Reconstruction)
    assert config_of().rounding_method in METHODS
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


@pytest.mark.slow
def test_bias_correction_restores_the_mean_output(request: pytest.FixtureRequest) -> None:
    model, plan, ranges, reader = prepared(request, "vit")
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
    rng, weight, x = problem(seed)
    x = x + 0.5
    seen = x + 0.2 * rng.standard_normal(x.shape)
    found = new_statistics(1, x.shape[1])
    found.add(x[None].astype(np.float32), seen[None].astype(np.float32))
    found.flush()
    rounded = NearestRounding().round(weight, WeightGrid(4))
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


@pytest.mark.parametrize(
    ("name", "correction"),
    [
        pytest.param(name, correction, marks=[] if correction in ("none", soon) else pytest.mark.slow)
        for name, soon in zip(METHODS_IN_SHORT, cycle(("bias", "affine")))
        for correction in ("none", "bias", "affine")
    ],
)
def test_every_method_rounds_every_weight_onto_its_grid(
    name: str, correction: str, request: pytest.FixtureRequest
) -> None:
    if name == "adaround" and correction != "none":
        with pytest.raises(RecipeError, match="adaround"):
            config_of(f"rounding={name}", f"correction={correction}")
        return
    model, plan, ranges, reader = prepared(request, "vit", tower="text")
    before, told = snapshot(model), []
    task = RoundingTask(model, plan, ranges, reader, correction, on_step=lambda *step: told.append(step[:3]))
    made = METHODS_IN_SHORT[name].round_weights(task)
    assert snapshot(model) == before
    assert set(made.weights) == {layer.weight for layer in plan.layers}
    for layer in plan.layers:
        weight, values = made.weights[layer.weight], constant(model.graph.initializers[layer.weight])
        rows = channels_first(values, layer.channel_axis)
        planned = plan.weight_bits[layer.weight]
        assert weight.num_bits == (7 if name == "adaround" and planned == 8 else planned)
        assert weight.integers.dtype == np.int8
        assert weight.integers.shape == rows.shape
        assert (weight.path is not None) == (layer.weight in plan.groups and name != "adaround")
        low, high = grid_limits(weight.num_bits) if weight.path is None else (-64, 64)
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
    model, plan, ranges, reader = prepared(request, "vit", "bits=w4a16", "target=cuda", tower="text")
    assert ranges == {}
    made = METHODS_IN_SHORT[name].round_weights(RoundingTask(model, plan, ranges, reader))
    assert set(made.weights) == {layer.weight for layer in plan.layers}
    assert {weight.num_bits for weight in made.weights.values()} == {4, 7 if name == "adaround" else 8}


@pytest.mark.parametrize("name", METHODS_IN_SHORT)
def test_a_weight_that_two_layers_share_is_rounded_once(name: str) -> None:
    rng = np.random.default_rng(0)
    text = "g (float[n, 8] x) => (float[n, 8] y) { a = MatMul(x, w)\n b = Relu(a)\n c = MatMul(b, w)\n y = Neg(c) }"
    model = parse(text, w=rng.standard_normal((8, 8)))
    reader, config = Feeds([rng.standard_normal((64, 8)).astype(np.float32)]), config_of()
    plan = make_plan(model.graph, config)
    ranges: dict[str, QuantParams] = collect_ranges(model, plan, reader, config)
    made = METHODS_IN_SHORT[name].round_weights(RoundingTask(model, plan, ranges, reader))
    assert set(made.weights) == {"w"}
