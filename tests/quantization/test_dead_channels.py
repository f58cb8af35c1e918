"""Channels and activations that training left for dead: small weights beside a bias, values that never change."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import config_of
from graphs import Feeds, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.values import constant, maker, nodes_of
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding import METHODS, RoundingTask
from d4c_onnx.quantization.rounding.base import WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.bias_room import least_scales, with_room
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.schedule import AdaRoundSchedule

# By channel: the size of its weights, and its bias. Twelve are dead, or nearly so, and four are not.
DEAD = [(size, bias) for size in (0, 1e-12, 3e-9, 1e-6) for bias in (0, 0.1, 10)]
SIZES, BIASES = (np.array(column) for column in zip(*DEAD, (1, 0), (2, 0.1), (17.6, -10), (1, 1), strict=True))
LAYERS = {
    "conv": ("[layer] z = Conv<kernel_shape = [3, 3], pads = [1, 1, 1, 1]>(x, w, b)", (16, 8, 3, 3), (6, 8, 5, 5)),
    "depthwise": ("[layer] z = Conv<kernel_shape = [3, 3], group = 16>(x, w, b)", (16, 1, 3, 3), (6, 16, 5, 5)),
    "gemm": ("[layer] z = Gemm<transB = 1>(x, w, b)", (16, 32), (50, 32)),
}
FORMS = {
    "w8a8": ("bits=w8a8",),
    "w4a8": ("bits=w4a8", "boundary_bits=4"),
    "groups": ("bits=w4a8", "boundary_bits=4", "group=16"),
    "corrected": ("bits=w4a8", "boundary_bits=4", "correction=affine"),
    "adaround": ("bits=w4a8", "boundary_bits=4", "rounding=adaround"),
    "w4a16": ("bits=w4a16", "boundary_bits=4", "target=cuda"),
    "tensorrt": ("bits=w8a8", "target=tensorrt"),
}


def _layer(
    kind: str, weight: np.ndarray, bias: np.ndarray, before: str = "x = Identity(data)", **constants: float
) -> ir.Model:
    line, _, given = LAYERS[kind]
    shape, out = (", ".join(["n", *map(str, sizes)]) for sizes in (given[1:], "cde"[: len(given) - 1]))
    text = f"g (float[{shape}] data) => (float[{out}] y) {{ {before}\n {line}\n y = Neg(z) }}"
    return parse(text, w=weight, b=bias, **constants)


def _quantized(model: ir.Model, batches: list[np.ndarray], folder: Path, *keys: str) -> ir.Model:
    save_model(model, folder / "float.onnx")
    made = folder / "quantised.onnx"
    quantize_encoder(folder / "float.onnx", made, Feeds(batches, "data"), config_of(*keys), threads=1)
    return load_model(made)


def _by_channel(values: np.ndarray) -> np.ndarray:
    return np.moveaxis(values, 1, 0).reshape(values.shape[1], -1)


@pytest.mark.parametrize("form", FORMS)
@pytest.mark.parametrize("kind", LAYERS)
def test_dead_channels_answer_as_in_float(
    kind: str, form: str, tmp_path: Path, rng: np.random.Generator, monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setitem(METHODS, "adaround", Reconstruction(AdaRoundSchedule(5, 0.01)))
    _, shape, given = LAYERS[kind]
    weight = rng.standard_normal(shape) * SIZES.reshape(-1, *[1] * (len(shape) - 1))
    model, batches = _layer(kind, weight, BIASES), [rng.standard_normal(given).astype(np.float32) for _ in range(3)]
    quantized = _quantized(model, batches, tmp_path, *FORMS[form])
    expected, got = (_by_channel(run(made, batches[0])) for made in (model, quantized))
    dead, error = slice(0, len(DEAD)), np.abs(got - expected).max(1)
    # a convolution's output is rounded to its own grid, one for all channels; a product's is not
    step = 0 if kind == "gemm" or form == "w4a16" else np.ptp(expected) / 255
    assert (error[dead] <= step + 1e-3 * np.abs(BIASES[dead]) + 1e-4).all()
    alive, most = slice(len(DEAD), None), 0.2 if "4" in FORMS[form][0] else 0.03
    assert np.linalg.norm((got - expected)[alive]) < most * np.linalg.norm(expected[alive])
    for node in nodes_of(quantized.graph, "Conv", "Gemm"):
        pair = maker(node.inputs[2])
        if pair is not None and len(pair.inputs) > 2:  # in integers
            integers, scale = constant(pair.inputs[0]).astype(np.float64), constant(pair.inputs[1])
            assert np.allclose((integers * scale)[dead], BIASES[dead], rtol=1e-4, atol=1e-6)
            assert np.abs(integers).max() < 2**30


@pytest.mark.parametrize("form", ["w8a8", "w4a8", "tensorrt"])
@pytest.mark.parametrize("value", [0.0, 1e-38, 1e-35, 1e-12, 3.0, -3.0])
@pytest.mark.parametrize("kind", LAYERS)
def test_constant_activations_answer_as_in_float(
    kind: str, value: float, form: str, tmp_path: Path, rng: np.random.Generator
) -> None:
    """Behind a Relu that never opens, or a gate that is shut."""
    _, shape, given = LAYERS[kind]
    model = _layer(
        kind,
        rng.standard_normal(shape),
        BIASES,
        "gated = Mul(data, shut)\n x = Add(gated, value)",
        shut=0.0,
        value=value,
    )
    batches = [rng.standard_normal(given).astype(np.float32) for _ in range(3)]
    quantized = _quantized(model, batches, tmp_path, *FORMS[form])
    # TensorRT's weights have the full range, whose products x86 without VNNI adds with a cut: as they stand, in float
    expected, got = run(model, batches[0]), run(quantized, batches[0], optimize=form != "tensorrt")
    assert np.abs(got - expected).max() < (0.1 if form == "w4a8" else 0.03) * np.abs(expected).max()


def _task(weights: int, scale: float, biases: list[np.ndarray]) -> RoundingTask:
    """Gemms that read one value, each with a bias; they share a weight where there is only one."""
    lines = [f"[g{number}] y{number} = Gemm(x, w{number % weights}, b{number})" for number in range(len(biases))]
    outputs = ", ".join(f"float[n, 4] y{number}" for number in range(len(biases)))
    constants = {f"b{number}": bias for number, bias in enumerate(biases)}
    constants |= {f"w{number}": np.ones((8, 4)) for number in range(weights)}
    model = parse(f"g (float[n, 8] x) => ({outputs}) {{ {' '.join(lines)} }}", **constants)
    return RoundingTask(model, make_plan(model.graph, config_of()), {"x": QuantParams(scale, 0, 8)}, Feeds([]))


def test_a_bias_takes_a_quarter_of_int32() -> None:
    [least] = least_scales(_task(1, 0.25, [np.array([0, 1, -10, 1e-45])])).values()
    assert least[0] == 0
    assert np.allclose(np.array([1, 10]) / (least[1:3].astype(np.float64) * 0.25), 2**29, rtol=1e-6)
    assert least[3] * np.float32(0.25) >= np.finfo(np.float32).tiny


def test_a_shared_weight_has_room_for_every_bias() -> None:
    biases = [np.array([1.0, 2, 3, 4]), np.array([4.0, 3, 2, 1])]
    [shared] = least_scales(_task(1, 0.5, biases)).values()
    own = list(least_scales(_task(2, 0.5, biases)).values())
    assert np.array_equal(shared, np.maximum(*own))
    [single] = least_scales(_task(1, 0.5, [np.array([-4.0])])).values()  # broadcast to all channels
    assert np.array_equal(single, np.full(4, own[0].max()))
    task = _task(1, 0.5, biases)
    task.ranges.pop("x")  # where activations stay in float
    assert least_scales(task) == {}


@given(st.integers(0, 10_000), st.sampled_from([(4, 0), (4, 8), (8, 0)]))
@settings(max_examples=30)
def test_raised_channels_are_rounded_to_nearest_and_others_left_alone(seed: int, kind: tuple[int, int]) -> None:
    draw, (bits, group_size) = np.random.default_rng(seed), kind
    grid = WeightGrid(bits, group_size)
    weight = (draw.standard_normal((6, 32)) * np.exp(draw.uniform(-3, 3, (6, 1)))).astype(np.float32)
    weight[5] = 0
    rounded = NearestRounding().round(weight, grid)
    factor = np.array([0, 0.5, 1.3, 4, 1000, 0.01], np.float32)
    made = with_room(weight, rounded, grid, rounded.scale * factor)
    low, high = (-64, 64) if group_size else grid_limits(bits)
    assert (made.scale[2:] == rounded.scale[2:] * factor[2:]).all()  # zeros have no scale of their own
    for kept in (0, 1):
        assert made.scale[kept] == rounded.scale[kept]
        assert np.array_equal(made.integers[kept], rounded.integers[kept])
    for raised in (2, 3):
        assert low <= made.integers[raised].min()
        assert made.integers[raised].max() <= high
        steps = made.scale[raised] * (15 if group_size else 1)
        assert np.abs(made.dequantize()[raised] - weight[raised]).max() <= steps
    assert not made.integers[4:].any()
    assert with_room(weight, rounded, grid, None) is rounded
    assert with_room(weight, rounded, grid, np.zeros(6, np.float32)) is rounded


def test_channels_of_zeros_alone_leave_the_others_integers() -> None:
    """None has to be raised, as in a mobile net whose dead channels are exactly zero."""
    weight = np.ones((3, 8), np.float32)
    weight[1] = 0
    rounded = NearestRounding().round(weight, WeightGrid(8))
    least = np.full(3, rounded.scale.min() / 2, np.float32)
    moved = with_room(weight, rounded, WeightGrid(8), least)
    assert np.array_equal(moved.integers, rounded.integers)
    assert moved.scale[1] == least[1]
    assert np.array_equal(moved.scale[[0, 2]], rounded.scale[[0, 2]])
