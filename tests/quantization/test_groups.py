"""Weights in groups: a small integer a group, a float scale a channel, products on the channel's int8 grid."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import material, prompts_of_one_length, quantize, section_of
from graphs import check, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.graph.forms import CAST, FORMS, INT8
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.stored import average_bits, convert_stored, find_stored, layer_bits, stored_weight
from d4c_onnx.graph.values import nodes_of
from d4c_onnx.quantization.plan import InputGroups, make_plan
from d4c_onnx.quantization.rounding import QuantizedWeight
from d4c_onnx.quantization.rounding.base import InputMoments, LayerRounding, stored_bits
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.storage.weights import store_scaled
from d4c_onnx.quantization.targets import target_of
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession

GROUPS = st.builds(InputGroups, st.sampled_from([2, 16, 32]), st.sampled_from([8, 15]))
LIMITS = {8: (-64, 56), 15: (-120, 105)}


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


def _check(rounded: QuantizedWeight, groups: InputGroups) -> None:
    channels, inputs = rounded.integers.shape
    multipliers = rounded.multipliers
    assert multipliers is not None
    assert (multipliers.dtype, multipliers.shape) == (np.uint8, (channels, inputs // groups.size))
    assert 1 <= multipliers.min() <= multipliers.max() <= groups.largest
    assert -8 <= rounded.integers.min() <= rounded.integers.max() <= 7
    products = rounded.products
    assert products.dtype == np.int8
    assert np.array_equal(products, rounded.integers.astype(int) * np.repeat(multipliers, groups.size, 1))
    low, high = LIMITS[groups.largest]
    assert low <= products.min() <= products.max() <= high
    assert rounded.scale.dtype == np.float32
    assert (rounded.scale > 0).all()
    assert np.array_equal(rounded.dequantize(), products.astype(np.float32) * rounded.scale[:, None])


@pytest.mark.parametrize("rounding", [NearestRounding(), GptqRounding(), GptaqRounding()])
@given(seed=st.integers(0, 10_000), groups=GROUPS, spread=st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=15, deadline=None)
def test_products_lie_on_the_channels_int8_grid(
    rounding: LayerRounding, seed: int, groups: InputGroups, spread: float
) -> None:
    weight = _weight(seed, 7, 64, spread)
    rounded = rounding.round(weight, 4, _moments(seed, 64) if rounding.uses_data else None, groups)
    _check(rounded, groups)
    assert np.isfinite(rounded.dequantize()).all()


@given(st.integers(0, 10_000), GROUPS, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([1e-42, 1e-37, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_groups_are_never_worse_than_one_scale_a_channel(
    seed: int, groups: InputGroups, spread: float, size: float
) -> None:
    weight = (_weight(seed, 9, 64, spread).astype(np.float64) * size).astype(np.float32)
    grouped, single = (NearestRounding().round(weight, 4, groups=own) for own in (groups, None))
    _check(grouped, groups)
    if size < 1e-30:  # too small for a grid of normal float32 numbers: zeros, and no error that counts
        return

    def error(rounded: QuantizedWeight) -> np.ndarray:
        return np.square((rounded.dequantize().astype(np.float64) - weight) / size).sum(1)

    assert (error(grouped) <= error(single) * (1 + 1e-5)).all()


def test_groups_win_where_groups_differ() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    errors = [
        float(np.square(NearestRounding().round(weight, 4, groups=groups).dequantize() - weight).mean())
        for groups in (InputGroups(16, 15), InputGroups(32, 15), InputGroups(128, 15), None)
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.8 * errors[3]


@given(st.integers(0, 10_000), st.sampled_from([8, 15]))
@settings(max_examples=15, deadline=None)
def test_gptq_in_groups_has_less_output_error_than_nearest_in_groups(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64)) / 8
    weight, gram, groups = rng.standard_normal((12, 64)).astype(np.float32), x.T @ x / 400, InputGroups(16, largest)
    learned = GptqRounding(0.01).round(weight, 4, InputMoments(gram, gram), groups)
    nearest = NearestRounding().round(weight, 4, groups=groups)

    def error(rounded: QuantizedWeight) -> float:
        return float(np.square(x @ (rounded.dequantize() - weight).T).mean())

    assert error(learned) < error(nearest)


def test_a_weight_on_a_grid_of_groups_comes_back() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-7, 8, (8, 64)).astype(np.int8)
    integers[:, ::16] = 7
    multipliers = rng.integers(5, 9, (8, 4)).astype(np.uint8)
    multipliers[:, 0] = 8
    made = QuantizedWeight(integers, rng.uniform(0.1, 1, 8).astype(np.float32), 4, multipliers)
    again = NearestRounding().round(made.dequantize(), 4, groups=InputGroups(16, 8))
    assert np.abs(again.dequantize() - made.dequantize()).max() < 0.03 * np.abs(made.dequantize()).max()


def test_multipliers_are_counted() -> None:
    assert stored_bits(4, InputGroups(32, 8)) == 4.125
    assert (stored_bits(4), stored_bits(6), stored_bits(7), stored_bits(8)) == (4, 8, 8, 8)


def _stored(model: ir.Model) -> list:
    return [stored for node in model.graph if (stored := stored_weight(node)) is not None]


@pytest.mark.parametrize(
    ("tower", "keys"),
    [
        pytest.param("image", ("rounding=nearest",), marks=pytest.mark.slow),
        ("text", ("rounding=nearest", "target=portable")),
        ("image", ("rounding=nearest", "int4_layout=nibbles", "reduce_range=false")),
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
    form = FORMS["nibbles" if portable or "int4_layout=nibbles" in keys else "cast"]
    # the other target's attention is an operator of onnxruntime's own, and was not tried with older releases
    assert report.minimum_onnxruntime == (
        form.minimum_onnxruntime if portable else max(form.minimum_onnxruntime, "1.20")
    )
    grouped = [stored for stored in _stored(made) if stored.form is form]
    assert len(grouped) >= (36 if tower == "image" else 18)
    assert {stored.num_bits for stored in grouped} == {4.125}
    assert report.layers == tuple(layer_bits(load_model(tmp_path / "q.onnx")))
    assert 4.125 <= average_bits(report.layers) < 4.6
    record = report.record()
    assert 4.125 in {layer.bits for layer in record.layers.values()} <= {4.125, 8, 16, 32}
    for stored in grouped:
        groups = stored.form.groups(stored.integers)
        largest, limits = (15, LIMITS[15]) if "reduce_range=false" in keys else (8, LIMITS[8])
        assert 1 <= groups.multipliers.min() <= groups.multipliers.max() <= largest
        assert limits[0] <= stored.unpack().min() <= stored.unpack().max() <= limits[1]
    inspection = inspect_encoder(tmp_path / "q.onnx")
    weighted = [layer for layer in inspection.layers if layer.shape and layer.bits <= 8]  # the rest stays float
    assert {layer.kernel for layer in weighted} == {"MatMulIntegerToFloat"}
    assert {layer.bits for layer in weighted} == {4.125, 8}
    twin = made.clone()
    for node in list(twin.graph):
        stored = stored_weight(node)
        if stored is not None and stored.form is form:
            convert_stored(twin.graph, stored, INT8)
    assert {stored.form for stored in _stored(twin)} <= {INT8, None}  # none: stays float
    fed = np.array(dataset.pixel_values) if tower == "image" else prompts_of_one_length(dataset)
    assert np.array_equal(EncoderSession(tmp_path / "q.onnx", threads=1).run(fed), run(twin, fed))


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
    plan = make_plan(graph, section_of("group=32"))
    assert set(plan.groups) == {name for name, bits in plan.weight_bits.items() if bits == 4}
    assert set(plan.groups.values()) == {InputGroups(32, 8)}
    full = make_plan(graph, section_of("group=32"), reduce_range=False)
    assert set(full.groups.values()) == {InputGroups(32, 15)}
    assert not make_plan(graph, section_of("group=0")).groups
    assert {groups.size for groups in make_plan(graph, section_of()).groups.values()} == {16}
    assert not make_plan(graph, section_of("group=32", "bits=w8a8")).groups
    assert not make_plan(graph, section_of("group=32", "rounding=adaround")).groups
    assert not make_plan(graph, section_of("group=32"), grouped=False).groups
    convolutions = load_model(material(request, "rn")[0].image_encoder).graph
    layers = {layer.weight: layer.op for layer in make_plan(convolutions, section_of()).layers}
    assert "Conv" not in {layers[name] for name in make_plan(convolutions, section_of("group=16")).groups}


def test_inputs_that_leave_a_rest_get_one_scale_a_channel() -> None:
    text = """mlp (float[n, 48] x) => (float[n, 8] y) {
        a = MatMul(x, first)
        b = Gemm<transB = 1>(a, second)
        y = MatMul(b, third)
    }"""
    shapes = {"first": (48, 96), "second": (40, 96), "third": (40, 8)}
    model = parse(text, **{name: np.ones(shape) for name, shape in shapes.items()})
    plan = make_plan(model.graph, section_of("group=32", "boundary_bits=4"))
    assert set(plan.groups) == {"second"}


@pytest.mark.parametrize("target", [pytest.param("openvino", marks=pytest.mark.slow), "tensorrt"])
def test_compilers_get_one_scale_a_channel(target: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    section = section_of("group=32", f"target={target}")
    assert "no groups" in target_of(section).note
    assert "no groups" not in target_of(section_of("group=0", f"target={target}")).note
    bundle, dataset = material(request, "vit")
    keys = ("rounding=nearest", f"target={target}")
    made = [
        quantize(bundle.image_encoder, dataset, tmp_path / f"{size}.onnx", *keys, f"group={size}") for size in (0, 32)
    ]
    assert (tmp_path / "0.onnx").read_bytes() == (tmp_path / "32.onnx").read_bytes()
    assert {layer.bits for layer in made[1][0].layers} == {4, 8, 16}


@given(seed=st.integers(0, 99), axis=st.sampled_from([0, 1]), dtype=st.sampled_from(["float", "float16"]))
@settings(max_examples=20, deadline=None)
def test_groups_come_back_scaled_where_only_weights_are_quantised(seed: int, axis: int, dtype: str) -> None:
    kind = np.float16 if dtype == "float16" else np.float32
    rows = np.random.default_rng(seed).standard_normal((6, 32)).astype(np.float32)
    rounded = NearestRounding().round(rows, 4, groups=InputGroups(16, 15))
    shape = (6, 32) if axis == 0 else (32, 6)
    text = f"one ({dtype}[1] x) => ({dtype}[{shape[0]}, {shape[1]}] y) {{ [add] y = Add(w, x) }}"
    model = parse(text, opset=18, w=np.zeros(shape, kind))
    store_scaled(model, {"w": (rounded, axis)})
    check(model)
    [add] = nodes_of(model.graph, "Add")
    stored = find_stored(add.inputs[0])
    assert stored is not None
    assert stored.form is CAST
    assert stored.num_bits == 4.25
    assert np.array_equal(stored.unpack(), channels_back(rounded.products, shape, axis))
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
