"""Weights in groups: a multiplier a group, a float scale a channel, levels on the channel's int8 grid."""

from pathlib import Path

import numpy as np
import pytest
from encoders import BOTH, config_of, material, prompts_of_one_length, quantize
from graphs import check, parse, run, stored_weights
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.graph.forms import INT8
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.stored import average_bits, convert_stored, find_stored, layer_bits, stored_weight
from d4c_onnx.graph.trellis import RATES, levels_of
from d4c_onnx.graph.trellis_form import TRELLIS
from d4c_onnx.graph.values import nodes_by_name
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rounding import QuantizedWeight
from d4c_onnx.quantization.rounding.base import InputMoments, LayerRounding, WeightGrid, stored_bits
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.trellis_search import trace, trace_nearest
from d4c_onnx.quantization.storage.weights import store_scaled
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession

SIZES = st.sampled_from([2, 16, 32])


def _weight(seed: int, channels: int, inputs: int, spread: float) -> np.ndarray:
    """Channels and groups of quite different sizes; some of them zero."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((channels, inputs)) * np.exp(spread * rng.standard_normal((channels, inputs)))
    weight[rng.random(channels) < 0.1] = 0
    weight[:, : inputs // 4] *= rng.random() < 0.7
    return weight.astype(np.float32)


def _moments(seed: int, inputs: int) -> InputMoments:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, inputs)) @ rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    seen = x + 0.1 * rng.standard_normal(x.shape)
    return InputMoments(seen.T @ seen / len(x), x.T @ seen / len(x))


def _check(rounded: QuantizedWeight, size: int) -> None:
    channels, inputs = rounded.integers.shape
    path = rounded.path
    assert path is not None
    assert (path.multipliers.dtype, path.multipliers.shape) == (np.uint8, (channels, inputs // size))
    assert (path.codes.dtype, path.codes.shape) == (np.uint8, (channels, inputs))
    assert max(path.codes.max(), path.multipliers.max()) <= 15
    assert rounded.integers.dtype == np.int8
    assert np.array_equal(rounded.integers, levels_of(path.codes, path.multipliers))
    assert np.abs(rounded.integers).max() <= 64
    assert rounded.scale.dtype == np.float32
    assert (rounded.scale > 0).all()
    assert np.array_equal(rounded.dequantize(), rounded.integers.astype(np.float32) * rounded.scale[:, None])


@pytest.mark.parametrize("rounding", [NearestRounding(), GptqRounding(), GptaqRounding()])
@given(seed=st.integers(0, 10_000), size=SIZES, spread=st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=15, deadline=None)
def test_levels_lie_on_the_channels_int8_grid(rounding: LayerRounding, seed: int, size: int, spread: float) -> None:
    weight = _weight(seed, 7, 64, spread)
    rounded = rounding.round(weight, WeightGrid(4, size), _moments(seed, 64) if rounding.uses_data else None)
    _check(rounded, size)
    assert np.isfinite(rounded.dequantize()).all()


@given(st.integers(0, 10_000), SIZES, st.sampled_from([0.0, 0.5]), st.sampled_from([1e-42, 1e-36, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_groups_are_better_than_one_scale_a_channel(seed: int, size: int, spread: float, factor: float) -> None:
    weight = (_weight(seed, 9, 64, spread).astype(np.float64) * factor).astype(np.float32)
    grouped, single = (NearestRounding().round(weight, WeightGrid(4, own)) for own in (size, 0))
    _check(grouped, size)
    assert not grouped.dequantize()[~weight.any(1)].any()  # zeros stay
    if factor < 1e-30:  # too small for a grid of normal float32 numbers: zeros, or coarse
        return

    def error(rounded: QuantizedWeight) -> float:
        return float(np.square((rounded.dequantize().astype(np.float64) - weight) / factor).sum())

    assert error(grouped) <= 1.1 * error(single)  # a grid has a place for zeros beside other weights, a path has none


@given(st.integers(0, 10_000), st.floats(0.5, 30))
@settings(max_examples=20, deadline=None)
def test_the_nearest_path_is_the_nearest_of_all(seed: int, spread: float) -> None:
    """Four inputs in two groups: all 16^4 paths and all multipliers that are tried are few enough to look at."""
    rng = np.random.default_rng(seed)
    weight, near = spread * rng.standard_normal((1, 4)), rng.integers(1, 16, (1, 2)).astype(np.uint8)
    codes, multipliers = trace_nearest(weight.astype(np.float32), np.ones(1, np.float32), near)
    found = float(np.square(levels_of(codes, multipliers) - weight.astype(np.float32)).sum())
    every = np.stack(np.meshgrid(*[np.arange(16, dtype=np.uint8)] * 4, indexing="ij"), -1).reshape(-1, 4)
    least = np.inf
    for first in near[0, 0] + np.array([-1, 0, 1]):
        for second in near[0, 1] + np.array([-1, 0, 1]):
            tried = np.tile(np.clip([first, second], 0, 15).astype(np.uint8), (len(every), 1))
            least = min(least, np.square(levels_of(every, tried) - weight.astype(np.float32)).sum(1).min())
    assert least * (1 - 1e-6) <= found <= 1.05 * least + 1  # levels are whole numbers, places between them are not


@given(st.integers(0, 10_000))
@settings(max_examples=10, deadline=None)
def test_a_path_is_better_than_rounding_each_input_by_itself(seed: int) -> None:
    """By more than a sixth, beside 16 levels as far apart as a path's state sees them."""
    weight = np.random.default_rng(seed).standard_normal((16, 256)).astype(np.float32)
    rounded = NearestRounding().round(weight, WeightGrid(4, 16))
    assert rounded.path is not None
    steps = np.repeat(2 * RATES[4].steps[rounded.path.multipliers], 16, axis=1) * rounded.scale[:, None]
    alone = (np.clip(np.rint(weight / steps + 7.5), 0, 15) - 7.5) * steps
    errors = [np.square(values - weight).sum() for values in (rounded.dequantize(), alone)]
    assert errors[0] < 5 / 6 * errors[1]


def test_repair_goes_on_over_blocks() -> None:
    """Blocks of 64 inputs: what the first one leaves is repaired in the second, which sees the first one's bits."""
    rng = np.random.default_rng(0)
    x = rng.standard_normal((400, 16)) @ rng.standard_normal((16, 128)) + 0.3 * rng.standard_normal((400, 128))
    gram, weight = x.T @ x / 400, 10 * rng.standard_normal((8, 128))
    near, factor = np.full((8, 8), 8, np.uint8), np.linalg.cholesky(np.linalg.inv(gram)).T
    repaired = weight - levels_of(*trace(weight, factor, near))
    alone = weight - levels_of(*trace_nearest(weight.astype(np.float32), np.ones(8, np.float32), near))
    errors = [np.einsum("ci,ij,cj->", rest, gram, rest) for rest in (repaired, alone)]
    assert errors[0] < 0.5 * errors[1]


def test_groups_win_where_groups_differ() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    errors = [
        float(np.square(NearestRounding().round(weight, WeightGrid(4, size)).dequantize() - weight).mean())
        for size in (16, 32, 128, 0)
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.8 * errors[3]


def test_multipliers_are_counted() -> None:
    assert (stored_bits(4, 32), stored_bits(3, 16), stored_bits(5, 16)) == (4.125, 3.25, 5.25)
    assert (stored_bits(4), stored_bits(6), stored_bits(7), stored_bits(8)) == (4, 8, 8, 8)


@pytest.mark.parametrize(
    ("tower", "keys"),
    [
        pytest.param("image", ("rounding=nearest",), marks=pytest.mark.slow),
        ("text", ("rounding=nearest", "target=portable")),
        pytest.param("image", ("rounding=nearest", "target=portable"), marks=pytest.mark.slow),
        pytest.param("image", ("rounding=gptq",), marks=pytest.mark.slow),
        pytest.param("text", ("rounding=gptaq", "correction=affine"), marks=pytest.mark.slow),
    ],
)
def test_a_file_in_groups_runs_and_answers_exactly_like_its_int8_twin(
    tower: str, keys: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, "vit")
    report, made = quantize(bundle.encoders[tower], dataset, tmp_path / "q.onnx", "group=32", *keys)
    check(made)
    portable = "target=portable" in keys
    # the other target's attention is an operator of onnxruntime's own, and was not tried with older releases
    assert report.minimum_onnxruntime == (TRELLIS.minimum_onnxruntime if portable else "1.20")
    grouped = [stored for stored in stored_weights(made) if stored.form is TRELLIS]
    assert len(grouped) >= (36 if tower == "image" else 18)
    assert {stored.num_bits for stored in grouped} == {4.125}
    assert report.layers == tuple(layer_bits(load_model(tmp_path / "q.onnx")))
    assert 4.125 <= average_bits(report.layers) < 4.6
    record = report.record()
    assert 4.125 in {layer.bits for layer in record.layers.values()} <= {4.125, 8, 8.5, 16, 32}
    for stored in grouped:
        assert stored.integers is not None
        assert np.array_equal(TRELLIS.coded(stored.integers).levels, stored.unpack())
    inspection = inspect_encoder(tmp_path / "q.onnx")
    weighted = [layer for layer in inspection.layers if layer.shape and layer.bits <= 8]  # the rest stays float
    assert {layer.kernel for layer in weighted} == {"MatMulIntegerToFloat"}
    assert {layer.bits for layer in weighted} == {4.125, 8}
    twin = made.clone()
    for node in list(twin.graph):
        stored = stored_weight(node)
        if stored is not None and stored.form is TRELLIS:
            convert_stored(twin.graph, stored, INT8)
    assert {stored.form for stored in stored_weights(twin)} <= {INT8, None}  # none: stays float
    fed = np.array(dataset.pixel_values) if tower == "image" else prompts_of_one_length(dataset)
    assert np.array_equal(EncoderSession(tmp_path / "q.onnx", threads=1).run(fed), run(twin, fed))


@pytest.mark.slow
def test_groups_bring_embeddings_nearer_to_float(tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle, dataset = material(request, "vit")
    fed = np.array(dataset.pixel_values)
    exact, cosines = EncoderSession(bundle.image_encoder).run(fed), []
    for size in (0, 16):
        quantize(bundle.image_encoder, dataset, tmp_path / f"{size}.onnx", "rounding=nearest", f"group={size}")
        cosines.append(float((EncoderSession(tmp_path / f"{size}.onnx").run(fed) * exact).sum(1).mean()))
    assert cosines[1] > cosines[0]


def test_which_weights_get_groups(request: pytest.FixtureRequest) -> None:
    graph = load_model(material(request, "vit")[0].image_encoder).graph
    plan = make_plan(graph, config_of("group=32"))
    assert set(plan.groups) == {name for name, bits in plan.weight_bits.items() if bits == 4}
    assert set(plan.groups.values()) == {32}
    assert not make_plan(graph, config_of("group=0")).groups
    assert set(make_plan(graph, config_of()).groups.values()) == {16}
    assert not make_plan(graph, config_of("group=32", "bits=w8a8")).groups
    assert not make_plan(graph, config_of("group=32", "rounding=adaround")).groups
    assert not make_plan(graph, config_of("group=32"), grouped=False).groups
    convolutions = load_model(material(request, "rn")[0].image_encoder).graph
    layers = {layer.weight: layer.op for layer in make_plan(convolutions, config_of()).layers}
    assert "Conv" not in {layers[name] for name in make_plan(convolutions, config_of("group=16")).groups}


def test_inputs_that_leave_a_rest_get_one_scale_a_channel() -> None:
    text = """mlp (float[n, 48] x) => (float[n, 8] y) {
        a = MatMul(x, first)
        b = Gemm<transB = 1>(a, second)
        y = MatMul(b, third)
    }"""
    shapes = {"first": (48, 96), "second": (40, 96), "third": (40, 8)}
    model = parse(text, **{name: np.ones(shape) for name, shape in shapes.items()})
    plan = make_plan(model.graph, config_of("group=32", "boundary_bits=4"))
    assert set(plan.groups) == {"second"}


@pytest.mark.parametrize("target", [pytest.param("openvino", marks=pytest.mark.slow), "tensorrt"])
@pytest.mark.parametrize("tower", BOTH)
def test_compilers_get_one_scale_a_channel(
    tower: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    config = config_of("group=32", f"target={target}")
    assert "no groups" in target_of(config).note
    assert "no groups" not in target_of(config_of("group=0", f"target={target}")).note
    bundle, dataset = material(request, "vit")
    keys = ("rounding=nearest", f"target={target}")
    made = [
        quantize(bundle.encoders[tower], dataset, tmp_path / f"{size}.onnx", *keys, f"group={size}") for size in (0, 32)
    ]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "32.onnx").read_bytes()
    wide = {"image": 16, "text": 32}[tower]  # the final projection; channels that left the integers
    assert {layer.bits for layer in made[1][0].layers} == {4, 8, wide}


@given(seed=st.integers(0, 99), axis=st.sampled_from([0, 1]), dtype=st.sampled_from(["float", "float16"]))
@settings(max_examples=20, deadline=None)
def test_groups_come_back_scaled_where_only_weights_are_quantised(seed: int, axis: int, dtype: str) -> None:
    kind = np.float16 if dtype == "float16" else np.float32
    rows = np.random.default_rng(seed).standard_normal((6, 32)).astype(np.float32)
    rounded = NearestRounding().round(rows, WeightGrid(4, 16))
    shape = (6, 32) if axis == 0 else (32, 6)
    text = f"one ({dtype}[1] x) => ({dtype}[{shape[0]}, {shape[1]}] y) {{ [add] y = Add(w, x) }}"
    model = parse(text, opset=18, w=np.zeros(shape, kind))
    store_scaled(model, {"w": (rounded, axis)})
    check(model)
    stored = find_stored(nodes_by_name(model.graph)["add"].inputs[0])
    assert stored is not None
    assert stored.form is TRELLIS
    assert stored.num_bits == 4.25
    assert np.array_equal(stored.unpack(), channels_back(rounded.integers, shape, axis))
    expected = channels_back(rounded.dequantize(), shape, axis).astype(kind)
    assert np.array_equal(run(model, np.zeros(1, kind)), expected)


def test_a_file_of_weights_in_groups_alone_answers_as_its_weights_say(
    tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, "vit")
    keys = ("bits=w4a16", "target=cuda", "rounding=nearest", "group=32")
    report, made = quantize(bundle.image_encoder, dataset, tmp_path / "q.onnx", *keys)
    check(made)
    assert {layer.bits for layer in report.layers} == {4.125, 8}
    fed = np.array(dataset.pixel_values)
    exact, got = (EncoderSession(path).run(fed) for path in (bundle.image_encoder, tmp_path / "q.onnx"))
    assert float((exact * got).sum(1).min()) > 0.98
