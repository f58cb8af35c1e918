"""Learned rounding: the algebra against first principles, the statistics against plain sums, one real file."""

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.calibration import D4CCalibrationDataReader
from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.files import load_graph
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.ranges import collect_ranges
from d4c_onnx.quantization.rounding import InputMoments, make_rounding
from d4c_onnx.quantization.rounding.base import grid_limits
from d4c_onnx.quantization.segments import SegmentedEncoder
from d4c_onnx.quantization.statistics import StatisticsCollector, fake_quantize, input_rows, quantized_name
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


@pytest.mark.parametrize("name", ["adaround", "", "GPTQ"])
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
    ranges = collect_ranges(model, plan.activations, reader, section)
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
    ranges = collect_ranges(model, plan.activations, reader, section)
    name = quantized_name(plan.layers[1].data)
    twin = SegmentedEncoder(fake_quantize(model, plan, ranges), reader)
    values = np.concatenate([batch[name] for batch in twin.advance([name])])
    assert len(np.unique(values)) <= 16


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
    section = load_recipe(None, ["quantization.bias_correction=true", "quantization.rounding=nearest"]).quantization
    reader = D4CCalibrationDataReader(vit_calibration[0])
    plan = make_plan(model.graph, section)
    ranges = collect_ranges(model, plan.activations, reader, section)
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
