"""Layers that read one value in different ways: each is rounded by the moments of its own rows."""

from pathlib import Path

import numpy as np
import pytest
from encoders import config_of
from graphs import Feeds, parse, run

from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.values import nodes_by_name
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.inside.ranges import collect_ranges
from d4c_onnx.quantization.inside.views import input_view
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding import METHODS, QuantizedWeight, RoundingTask

# FastViT's stem has the first two; a value with channels first is no Gemm's, but a product's it can be.
IMAGE = "float[n, 8, 6, 16] x"
READERS = {
    "conv3": "[conv3] conv3_y = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, conv3_w, bias)",
    "conv1": "[conv1] conv1_y = Conv<kernel_shape = [1, 1]>(x, conv1_w, bias)",
    "strided": "[strided] strided_y = Conv<kernel_shape = [3, 3], strides = [2, 2]>(x, conv3_w2, bias)",
    "dilated": "[dilated] dilated_y = Conv<kernel_shape = [3, 3], dilations = [2, 2]>(x, conv3_w3, bias)",
    "grouped": "[grouped] grouped_y = Conv<kernel_shape = [3, 3], group = 4>(x, grouped_w, bias)",
    "depthwise": "[depthwise] depthwise_y = Conv<kernel_shape = [1, 1], group = 8>(x, depthwise_w, bias)",
    "product": "[product] product_y = MatMul(x, product_w)",
}
SHAPES = {
    "conv3_w": (8, 8, 3, 3),
    "conv1_w": (8, 8, 1, 1),
    "conv3_w2": (8, 8, 3, 3),
    "conv3_w3": (8, 8, 3, 3),
    "grouped_w": (8, 2, 3, 3),
    "depthwise_w": (8, 1, 1, 1),
    "product_w": (16, 8),
}
# a Gemm reads matrices only
MATRIX = "float[16, 16] x"
GEMMS = {
    "gemm": "[gemm] gemm_y = Gemm(x, gemm_w, gemm_b)",
    "transposed": "[transposed] transposed_y = Gemm<transA = 1>(x, gemm_w2, gemm_b)",
    "matmul": "[matmul] matmul_y = MatMul(x, gemm_w3)",
}
GEMM_SHAPES = {"gemm_w": (16, 8), "gemm_w2": (16, 8), "gemm_w3": (16, 8)}


def _graph(given: str, lines: dict[str, str], shapes: dict[str, tuple[int, ...]], names: list[str]):
    """The named layers side by side."""
    draw = np.random.default_rng(0)
    weights = {name: draw.standard_normal(shape) for name, shape in shapes.items()}
    weights |= {"bias": draw.standard_normal(8), "gemm_b": draw.standard_normal(8)}
    text = "\n".join(lines[name] for name in names)
    used = {name: values for name, values in weights.items() if f"{name}," in text or f"{name})" in text}
    outputs = ", ".join(f"float[{name}_a, {name}_b, {name}_c, {name}_d] {name}_y" for name in names)
    if given == MATRIX:
        outputs = ", ".join(f"float[16, 8] {name}_y" for name in names)
    return parse(f"g ({given}) => ({outputs}) {{ {text} }}", **used)


def _batches(given: str) -> list[np.ndarray]:
    """Channels, columns and neighbours correlate, each in their own way."""
    shape = (16, 16) if given == MATRIX else (4, 8, 6, 16)
    draw = np.random.default_rng(1)
    batches = [draw.standard_normal(shape).astype(np.float32) for _ in range(4)]
    mixing = draw.standard_normal((shape[1], shape[1])).astype(np.float32)
    mixed = [np.einsum("nc...,cd->nd...", batch, mixing) * np.linspace(0.1, 2, 16) for batch in batches]
    return [(batch + np.roll(batch, 1, -1) + 0.5).astype(np.float32) for batch in mixed]


def _rounded(given, lines, shapes, names: list[str], method: str, correction: str) -> dict[str, QuantizedWeight]:
    model, config = _graph(given, lines, shapes, names), config_of("bits=w4a8", "boundary_bits=4", "group=16")
    plan, reader = make_plan(model.graph, config), Feeds(_batches(given))
    ranges = collect_ranges(model, plan, reader, config, threads=1)
    task = RoundingTask(model, plan, ranges, reader, correction, threads=1)
    weights = METHODS[method].round_weights(task).weights
    return {layer.node: weights[layer.weight] for layer in plan.layers}


@pytest.mark.parametrize("correction", ["none", "affine"])
@pytest.mark.parametrize("method", ["gptq", "gptaq"])
@pytest.mark.parametrize(
    ("given", "lines", "shapes"), [(IMAGE, READERS, SHAPES), (MATRIX, GEMMS, GEMM_SHAPES)], ids=["convs", "gemms"]
)
def test_a_layer_is_rounded_as_if_it_were_alone(given, lines, shapes, method: str, correction: str) -> None:
    together = _rounded(given, lines, shapes, list(lines), method, correction)
    assert list(together) == list(lines)
    for name in lines:
        [alone] = _rounded(given, lines, shapes, [name], method, correction).values()
        assert np.array_equal(together[name].integers, alone.integers), name
        assert np.array_equal(together[name].scale, alone.scale), name


def test_views_are_equal_where_rows_are() -> None:
    """Layers of one geometry share their moments: q, k and v, or the two convolutions of a residual block."""
    model = _graph(IMAGE, READERS, SHAPES, list(READERS))
    nodes = nodes_by_name(model.graph)
    views = {
        layer.node: input_view(nodes[layer.node], SHAPES[layer.weight], "x") for layer in weighted_layers(model.graph)
    }
    assert len(set(views.values())) == len(READERS)
    assert input_view(nodes["conv3"], (4, 8, 3, 3), "x") == views["conv3"]
    assert input_view(nodes["conv3"], (4, 8, 3, 3), "z") != views["conv3"]
    padded, plain = (views[name].rows(_batches(IMAGE)[0]) for name in ("conv3", "dilated"))
    assert padded.shape == (1, 4 * 6 * 16, 72)
    assert plain.shape == (1, 4 * 2 * 12, 72)


def test_a_stem_of_two_kernels_is_written(tmp_path: Path) -> None:
    """As in FastViT: both branches of the stem read the image, and their sum goes on."""
    draw = np.random.default_rng(0)
    text = """stem (float[n, 3, 12, 12] x) => (float[n, 8, 6, 6] y) {
        [wide] a = Conv<kernel_shape = [3, 3], strides = [2, 2], pads = [1, 1, 1, 1]>(x, wide, bias)
        [narrow] b = Conv<kernel_shape = [1, 1], strides = [2, 2]>(x, narrow)
        c = Add(a, b)
        y = Relu(c)
    }"""
    shapes = {"wide": (8, 3, 3, 3), "narrow": (8, 3, 1, 1), "bias": (8,)}
    model = parse(text, **{name: draw.standard_normal(shape) for name, shape in shapes.items()})
    save_model(model, tmp_path / "float.onnx")
    batches = [draw.standard_normal((4, 3, 12, 12)).astype(np.float32) for _ in range(4)]
    made = tmp_path / "quantised.onnx"
    report = quantize_encoder(tmp_path / "float.onnx", made, Feeds(batches), config_of("bits=w4a8", "boundary_bits=4"))
    assert {layer.bits for layer in report.layers} == {4}
    expected, got = (run(loaded, batches[0]) for loaded in (model, load_model(made)))
    assert np.abs(got - expected).max() < 0.15 * np.abs(expected).max()


@pytest.mark.parametrize("mode", ["SAME_UPPER", "SAME_LOWER", "VALID"])
@pytest.mark.parametrize(("kernel", "stride", "dilation"), [(3, 1, 1), (3, 2, 1), (2, 3, 1), (4, 1, 1)])
def test_padding_that_follows_from_the_size(mode: str, kernel: int, stride: int, dilation: int) -> None:
    """What a view's rows times the weight give is what onnxruntime computes."""
    weight = np.random.default_rng(0).standard_normal((5, 8, kernel, kernel)).astype(np.float32)
    line = f'[conv] y = Conv<auto_pad = "{mode}", strides = [{stride}, {stride}], dilations = [{dilation}, {dilation}]>'
    model = parse(f"g ({IMAGE}) => (float[n, a, b, c] y) {{ {line}(x, weight) }}", weight=weight)
    batch = _batches(IMAGE)[0]
    expected = run(model, batch).transpose(0, 2, 3, 1).reshape(-1, 5)
    rows = input_view(nodes_by_name(model.graph)["conv"], weight.shape, "x").rows(batch)[0]
    assert np.allclose(rows @ weight.reshape(5, -1).T, expected, atol=1e-3)


@pytest.mark.parametrize("method", ["gptq", "gptaq"])
def test_a_weight_on_the_left(method: str) -> None:
    """It sums over the axis before the last, and is rounded like the same product with the weight on the right."""
    weight = np.random.default_rng(0).standard_normal((12, 8)).astype(np.float32)
    batches, found = [np.ascontiguousarray(batch.swapaxes(1, 2)) for batch in _batches(IMAGE)], []
    for line, values in (
        ("[left] y = MatMul(weight, x)", weight),
        ("t = Transpose<perm = [0, 1, 3, 2]>(x) [left] y = MatMul(t, weight)", weight.T),
    ):
        text = f"g (float[n, 6, 8, 16] x) => (float[n, 6, b, c] y) {{ {line} }}"
        model, config = parse(text, weight=values), config_of("bits=w4a8", "boundary_bits=4", "group=0")
        plan, reader = make_plan(model.graph, config), Feeds(batches)
        ranges = collect_ranges(model, plan, reader, config, threads=1)
        task = RoundingTask(model, plan, ranges, reader, "none", threads=1)
        [made] = METHODS[method].round_weights(task).weights.values()
        found.append(made)
    assert np.array_equal(found[0].integers, found[1].integers)
    assert np.allclose(found[0].scale, found[1].scale)


def test_a_stack_of_matrices_is_rounded_to_nearest(tmp_path: Path) -> None:
    """A matrix for each head: a channel has no moments of one kind."""
    draw = np.random.default_rng(0)
    text = "g (float[n, 4, 6, 16] x) => (float[n, 4, 6, 8] y) { [stack] y = MatMul(x, weight) }"
    weight = draw.standard_normal((4, 16, 8)).astype(np.float32)
    batches = [draw.standard_normal((4, 4, 6, 16)).astype(np.float32) for _ in range(2)]
    found = {}
    for method in ("gptaq", "gptq", "nearest"):
        model, config = parse(text, weight=weight), config_of("bits=w4a8", "boundary_bits=4", f"rounding={method}")
        plan, reader = make_plan(model.graph, config), Feeds(batches)
        ranges = collect_ranges(model, plan, reader, config, threads=1)
        task = RoundingTask(model, plan, ranges, reader, "none", threads=1)
        [found[method]] = METHODS[method].round_weights(task).weights.values()
    assert np.array_equal(found["gptaq"].integers, found["nearest"].integers)
    assert np.array_equal(found["gptq"].integers, found["nearest"].integers)
