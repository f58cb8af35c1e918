"""Quantisation: packing and rounding maths, the layouts, and real files that onnxruntime runs on int8 kernels."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, numpy_helper

from d4c_onnx.bundle import Bundle, file_size_bytes
from d4c_onnx.calibration import CalibrationSet, D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.errors import BundleError, GraphError, RecipeError
from d4c_onnx.graph.bits import average_bits, layer_bits
from d4c_onnx.graph.files import load_graph, opset_of
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.manifest import EXACT_PRODUCTS
from d4c_onnx.quantization import quantize_bundle_files, quantize_encoder
from d4c_onnx.quantization.calibration_batches import images_at_a_time
from d4c_onnx.quantization.layout import int4_initializer, pack_halves, pack_int4, store_token_table, unpack_int4
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.ranges import collect_ranges
from d4c_onnx.quantization.rounding import make_rounding
from d4c_onnx.quantization.rounding.base import QuantizedWeight, grid_limits
from d4c_onnx.quantization.rounding.nearest import round_to_grid, search_scales
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.kernels import count_kernels
from d4c_onnx.runtime.session import EncoderSession

FULL_RANGE = "quantization.reduce_range=false"
NEAREST = "quantization.rounding=nearest"  # a quarter of the time, where the rounding is not the point
NIBBLES = hnp.arrays(np.int8, hnp.array_shapes(max_dims=4, max_side=7), elements=st.integers(-8, 7))
WEIGHTS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.floats(-100, 100, width=32)
)


@given(NIBBLES)
def test_int4_packing_round_trip_and_onnx_agrees(values: np.ndarray) -> None:
    raw = pack_int4(values)
    assert len(raw) == (values.size + 1) // 2
    assert np.array_equal(unpack_int4(raw, values.shape), values)
    decoded = numpy_helper.to_array(int4_initializer("w", values))
    assert np.array_equal(decoded.astype(np.int8), values)


@given(hnp.arrays(np.int8, (6, 10), elements=st.integers(-8, 7)), st.lists(st.integers(0, 5), min_size=1, max_size=4))
@settings(max_examples=25, deadline=None)
def test_packed_token_rows_come_back_as_they_were(values: np.ndarray, ids: list[int]) -> None:
    """onnxruntime unpacks exactly the rows that are looked up; half a byte a value."""
    table = np.zeros(values.shape, np.float32)
    graph = onnx.helper.make_graph(
        [onnx.helper.make_node("Gather", ["table", "ids"], ["rows"], name="look_up")],
        "one",
        [onnx.helper.make_tensor_value_info("ids", TensorProto.INT64, ["n"])],
        [onnx.helper.make_tensor_value_info("rows", TensorProto.FLOAT, ["n", 10])],
        [numpy_helper.from_array(table, "table")],
    )
    model = onnx.helper.make_model(graph, opset_imports=[onnx.helper.make_opsetid("", 18)], ir_version=8)
    scale = np.linspace(0.5, 3, 6, dtype=np.float32)
    store_token_table(model, model.graph.node[0], "table", QuantizedWeight(values, scale, 4))
    assert pack_halves(values).nbytes * 2 == values.size
    got = EncoderSession(model.SerializeToString()).run(np.array(ids, np.int64))
    assert np.array_equal(got, (values * scale[:, None])[ids])


@given(WEIGHTS, st.sampled_from([4, 6, 7, 8]))
@settings(deadline=None)
def test_nearest_stays_on_its_grid_and_within_half_a_step(weight: np.ndarray, num_bits: int) -> None:
    rounded = make_rounding("nearest").round(weight, num_bits)
    low, high = grid_limits(num_bits)
    assert rounded.integers.dtype == np.int8
    assert rounded.integers.min() >= low
    assert rounded.integers.max() <= high
    assert np.isfinite(rounded.scale).all()
    assert (rounded.scale > 0).all()
    inside = np.abs(weight) <= rounded.scale[:, None] * high
    error = np.abs(rounded.dequantize() - weight)
    assert (error[inside] <= np.broadcast_to(rounded.scale[:, None] * 0.5001, weight.shape)[inside] + 1e-30).all()


@given(WEIGHTS, st.sampled_from([4, 6, 7, 8]))
@settings(deadline=None)
def test_searched_scale_is_never_worse_than_the_maximum(weight: np.ndarray, num_bits: int) -> None:
    scale = search_scales(weight, num_bits)
    high = grid_limits(num_bits)[1]
    largest = np.abs(weight).max(1)
    plain = np.where(largest > 1e-20, largest / high, 1).astype(np.float32)

    def error(scales: np.ndarray) -> np.ndarray:
        return np.square(round_to_grid(weight, scales, num_bits) * scales[:, None] - weight).sum(1, dtype=np.float64)

    # the search's candidates include 1.0 up to its step of a hundredth
    assert (error(scale) <= error(plain) * 1.02 + 1e-12 + 1e-4 * np.square(largest) * weight.shape[1]).all()


def test_values_on_a_grid_survive_exactly() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-8, 8, (5, 64)).astype(np.int8)
    integers[:, 0] = 7
    scale = rng.uniform(0.01, 2, 5).astype(np.float32)
    assert np.array_equal(round_to_grid(integers * scale[:, None], scale, 4), integers)


def test_zero_channels_are_harmless() -> None:
    weight = np.zeros((2, 8), np.float32)
    weight[1] = 1e-42
    rounded = make_rounding("nearest").round(weight, 4)
    assert not rounded.integers.any()
    assert np.isfinite(rounded.dequantize()).all()


def test_unknown_rounding_is_refused() -> None:
    with pytest.raises(RecipeError, match="nearest"):
        make_rounding("magic")


def test_plan_gives_the_ends_eight_bits(vit_bundle: Bundle) -> None:
    plan = make_plan(load_graph(vit_bundle.image_encoder).graph, load_recipe(None).quantization)
    wide = [layer.op for layer in plan.layers if plan.weight_bits[layer.weight] == 7]  # 8 bits of reduced range
    assert wide == ["Conv", "MatMul"]
    full = make_plan(load_graph(vit_bundle.image_encoder).graph, load_recipe(None, (FULL_RANGE,)).quantization)
    assert sorted(set(full.weight_bits.values())) == [4, 8]
    assert set(plan.op_types) == {"Conv", "MatMul"}
    graph = load_graph(vit_bundle.image_encoder).graph
    del graph.node[:]
    with pytest.raises(GraphError, match="nothing to quantise"):
        make_plan(graph, load_recipe(None).quantization)


def _quantize(bundle: Bundle, tower: str, calibration: object, target: Path, *sets: str):
    section = load_recipe(None, sets).quantization
    kind = D4CCalibrationDataReader if tower == "image" else PromptCalibrationDataReader
    report = quantize_encoder(bundle.encoders[tower], target, kind(calibration), section)
    return report, load_graph(target)


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("model", ["vit", pytest.param("rn", marks=pytest.mark.slow)])
def test_w4a8_file(model: str, tower: str, tmp_path: Path, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    calibration = (
        request.getfixturevalue("vit_calibration")[0] if model == "vit" else request.getfixturevalue("rn_calibration")
    )
    target = tmp_path / "q.onnx"
    report, graph = _quantize(bundle, tower, calibration, target)
    onnx.checker.check_model(graph)
    assert opset_of(graph) == 21
    assert report.minimum_onnxruntime == "1.23"
    # only the first and last layers keep 8 bits, and the levels of every channel are at most 16
    layers = layer_bits(graph)
    assert sum(layer.bits == 8 for layer in layers) <= 2
    assert {layer.bits for layer in layers} == {4, 8}
    assert report.layers == tuple(layers)
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.INT4 and len(tensor.dims) == 2:
            values = numpy_helper.to_array(tensor).astype(np.int8)
            assert all(len(np.unique(values[:, column])) <= 16 for column in range(values.shape[1]))
    # every weighted layer runs on an int8 kernel
    kernels = count_kernels(target)
    attention = sum(node.op_type == "MatMul" for node in graph.graph.node) + sum(
        node.op_type in ("Gemm", "Conv") for node in graph.graph.node
    )
    assert kernels["int8"] == len(layers)
    assert kernels["float"] == attention - len(layers)
    assert target.stat().st_size * 6 <= bundle.encoders[tower].stat().st_size


def test_average_bits_over_both_files(tmp_path: Path, rn_bundle: Bundle, rn_calibration: Path) -> None:
    layers = []
    for tower in ("image", "text"):
        report, _ = _quantize(rn_bundle, tower, rn_calibration, tmp_path / f"{tower}.onnx", NEAREST)
        layers.extend(report.layers)
    assert 4 < average_bits(layers) <= 4.3


@pytest.mark.parametrize("tower", ["image", "text"])
def test_int4_layout_answers_exactly_like_int8(
    tower: str, tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    """Store the very same integers as int8: the Cast layout must not change a bit of the answer."""
    _, graph = _quantize(vit_bundle, tower, vit_calibration[0], tmp_path / "q.onnx", NEAREST)
    plain = copy.deepcopy(graph)
    index = GraphIndex(plain.graph)
    for node in list(plain.graph.node):
        if node.op_type == "Cast" and node.input[0].endswith("_int4"):
            values = numpy_helper.to_array(index.initializers[node.input[0]]).astype(np.int8)
            plain.graph.initializer.append(numpy_helper.from_array(values, node.output[0]))
            plain.graph.initializer.remove(index.initializers[node.input[0]])
            plain.graph.node.remove(node)
    assert not any(tensor.data_type == TensorProto.INT4 for tensor in plain.graph.initializer)
    if tower == "image":
        fed = np.array(vit_calibration[1].pixel_values)
    else:
        fed = np.array([row for row in vit_calibration[1].input_ids if len(row) == 8], np.int64)
    expected = EncoderSession(plain.SerializeToString()).run(fed)
    assert np.array_equal(EncoderSession(tmp_path / "q.onnx").run(fed), expected)


def test_optimised_and_plain_execution_agree(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    _quantize(vit_bundle, "image", vit_calibration[0], tmp_path / "q.onnx", NEAREST)
    pixels = np.array(vit_calibration[1].pixel_values)
    fast, plain = (EncoderSession(tmp_path / "q.onnx", optimize=optimize).run(pixels) for optimize in (True, False))
    assert float((fast * plain).sum(1).min()) > 0.9995


def test_six_bit_activations_never_leave_their_grid(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    report, graph = _quantize(vit_bundle, "image", vit_calibration[0], tmp_path / "q.onnx", "quantization.bits=w6a6")
    assert {layer.bits for layer in report.layers} == {8}  # there is no 6-bit type: stored as int8
    for tensor in graph.graph.initializer:
        if tensor.data_type == TensorProto.INT8 and tensor.name.endswith("_quantized") and len(tensor.dims) == 2:
            values = numpy_helper.to_array(tensor)
            wide = values.shape in ((192, 128), (128, 128))  # the patches and the projection keep 8
            assert wide or (values.min() >= -32 and values.max() <= 31)
    quantizers = [node for node in graph.graph.node if node.op_type == "QuantizeLinear"]
    opened = copy.deepcopy(graph)
    for node in quantizers:
        opened.graph.output.append(onnx.helper.make_tensor_value_info(node.output[0], TensorProto.UINT8, None))
    session = EncoderSession(opened.SerializeToString(), optimize=False)
    pixels = np.array(vit_calibration[1].pixel_values) * 3  # far beyond what was calibrated
    values = session.run_all(pixels)
    assert len(quantizers) > 20
    assert max(int(values[node.output[0]].max()) for node in quantizers) <= 63


@pytest.mark.parametrize("bits", ["w4a8", "w8a8"])
def test_no_product_can_saturate(
    bits: str, tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    """x86 without VNNI adds two products of uint8 and int8 in 16 bits: no pair of stored weights may overflow that."""
    stored = {}
    for name, extra in (("reduced", ()), ("full", (FULL_RANGE,))):
        sets = (f"quantization.bits={bits}", "quantization.rounding=nearest", *extra)
        _, model = _quantize(vit_bundle, "image", vit_calibration[0], tmp_path / f"{name}.onnx", *sets)
        index = GraphIndex(model.graph)
        weights = [index.constant(layer.weight).astype(np.int32) for layer in layer_bits(model)]
        stored[name] = max(int(np.abs(values).max()) for values in weights)
    assert 2 * 255 * stored["reduced"] <= np.iinfo(np.int16).max < 2 * 255 * stored["full"]


def test_full_range_names_the_session_it_needs(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    for name, extra, entries in (("reduced", (), {}), ("full", (FULL_RANGE,), EXACT_PRODUCTS)):
        section = load_recipe(None, ("quantization.bits=w8a8", *extra)).quantization
        told: dict[str, tuple[int, int]] = {}
        made = quantize_bundle_files(
            vit_bundle,
            vit_calibration[1],
            tmp_path / name,
            section,
            recipe_dump={"seed": 0, "quantization": {}},
            on_step=lambda stage, done, total, _, told=told: told.update({stage: (done, total)}),
        )
        assert made.session_entries == entries
        assert list(told) == ["fold", "calibrate", "round", "write", "check"]  # whoever waits sees where it is
        assert all(done == total for done, total in told.values())


def test_token_table_rows_are_dequantised_one_by_one(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    for bits, dtype in (("4", TensorProto.UINT8), ("8", TensorProto.INT8)):
        sets = ("quantization.bits=w8a8", f"quantization.embedding_bits={bits}")
        report, graph = _quantize(vit_bundle, "text", vit_calibration[0], tmp_path / f"{bits}.onnx", *sets)
        tables = [tensor for tensor in graph.graph.initializer if tensor.dims and tensor.dims[0] == 49408]
        assert sorted(tensor.data_type for tensor in tables) == sorted([dtype, TensorProto.FLOAT])
        assert next(list(t.dims) for t in tables if t.data_type == TensorProto.FLOAT) == [49408, 1]
        assert next(t.dims[1] for t in tables if t.data_type == dtype) == 64 * int(bits) // 8
        assert report.token_table_bits == int(bits)
        ids = np.array(vit_calibration[1].input_ids[0], np.int64)[None]
        got, expected = (
            EncoderSession(tmp_path / f"{bits}.onnx").run(ids),
            EncoderSession(vit_bundle.text_encoder).run(ids),
        )
        assert float((got * expected).sum()) > 0.999


def test_encoders_beyond_one_protobuf(
    tmp_path: Path,
    vit_bundle: Bundle,
    vit_calibration: tuple[Path, CalibrationSet],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    """With limits lowered to what a mini passes: weights beside the graph on every way, and the same answers."""
    sets = ("quantization.bits=w8a8", "quantization.rounding=gptaq")
    _quantize(vit_bundle, "text", vit_calibration[0], tmp_path / "one.onnx", *sets)
    for place in ("graph.files.PROTOBUF_LIMIT_BYTES", "quantization.qdq.PROTOBUF_LIMIT_BYTES"):
        monkeypatch.setattr(f"d4c_onnx.{place}", 10_000)
    monkeypatch.setattr("d4c_onnx.runtime.session._IN_MEMORY_BYTES", 10_000)
    _quantize(vit_bundle, "text", vit_calibration[0], tmp_path / "large.onnx", *sets)
    assert (tmp_path / "large.onnx.data").stat().st_size > 10 * (tmp_path / "large.onnx").stat().st_size
    ids = np.array(vit_calibration[1].input_ids[0], np.int64)[None]
    one, large = (EncoderSession(tmp_path / f"{name}.onnx").run(ids) for name in ("one", "large"))
    assert np.array_equal(one, large)


@pytest.mark.parametrize("tower", ["image", "text"])
def test_external_data_holds_the_weights_and_answers_the_same(
    tower: str, tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    _quantize(vit_bundle, tower, vit_calibration[0], tmp_path / "one.onnx", NEAREST)
    _quantize(vit_bundle, tower, vit_calibration[0], tmp_path / "two.onnx", NEAREST, "quantization.external_data=true")
    assert not (tmp_path / "one.onnx.data").exists()
    assert file_size_bytes(tmp_path / "two.onnx") * 6 <= vit_bundle.encoders[tower].stat().st_size
    fed = np.array(vit_calibration[1].pixel_values if tower == "image" else [vit_calibration[1].input_ids[0]])
    one, two = (EncoderSession(tmp_path / f"{name}.onnx").run(fed) for name in ("one", "two"))
    assert np.array_equal(one, two)
    (tmp_path / "two.onnx.data").unlink()
    with pytest.raises(BundleError, match="cannot load"):
        EncoderSession(tmp_path / "two.onnx")


def test_attention_products_in_int8_on_request(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    _quantize(vit_bundle, "image", vit_calibration[0], tmp_path / "q.onnx", NEAREST, "quantization.attention=int8")
    assert count_kernels(tmp_path / "q.onnx")["float"] == 0


def test_same_input_same_file(tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]) -> None:
    for name in "ab":
        _quantize(vit_bundle, "text", vit_calibration[0], tmp_path / f"{name}.onnx")
    assert (tmp_path / "a.onnx").read_bytes() == (tmp_path / "b.onnx").read_bytes()


def test_a_bit_budget_is_spent_and_not_exceeded(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    made = {}
    for sets in ((), ("quantization.average_bits=4.8",), ("quantization.average_bits=4.05",)):
        recipe = load_recipe(None, ["quantization.rounding=nearest", *sets])
        target = tmp_path / f"{len(made)}"
        arguments = (vit_bundle, vit_calibration[1], target, recipe.quantization)
        if sets and sets[0].endswith("4.05"):  # the first and last layers alone take more
            with pytest.raises(RecipeError, match="boundary_bits"):
                quantize_bundle_files(*arguments, recipe_dump=recipe.model_dump(mode="json"))
            assert not target.exists()
            continue
        bundle = quantize_bundle_files(*arguments, recipe_dump=recipe.model_dump(mode="json"))
        graphs = [load_graph(path) for path in bundle.encoders.values()]
        counted = average_bits([layer for graph in graphs for layer in layer_bits(graph)])
        assert bundle.manifest.quantization.weight_bits_average == pytest.approx(counted, abs=1e-4)
        made[sets] = counted, bundle.manifest.quantization.encoders
    (base, _), (spent, encoders) = made.values()
    assert base < 4.3
    assert 4.7 < spent <= 4.8
    wide = {name: sum(row["bits"] == 8 for row in report["layers"].values()) for name, report in encoders.items()}
    assert sum(wide.values()) > 4


def test_softmax_needs_no_calibration(vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]) -> None:
    model = load_graph(vit_bundle.image_encoder)
    section = load_recipe(None, ["quantization.attention=int8"]).quantization
    plan = make_plan(model.graph, section)
    ranges = collect_ranges(model, plan, D4CCalibrationDataReader(vit_calibration[0]), section)
    assert len(plan.probabilities) == 6
    for name in plan.probabilities:
        assert (ranges[name].zero_point, ranges[name].scale) == (0, float(np.float32(1 / 255)))


def test_levels_of_every_channel_are_at_most_sixteen(
    tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    """Counted in the written file, from the raw nibbles; together the weights use all sixteen."""
    _quantize(vit_bundle, "image", vit_calibration[0], tmp_path / "q.onnx")
    graph = load_graph(tmp_path / "q.onnx").graph
    stored = [tensor for tensor in graph.initializer if tensor.data_type == TensorProto.INT4]
    assert len(stored) == 36
    seen = set()
    for tensor in stored:
        values = unpack_int4(tensor.raw_data, tuple(tensor.dims))
        assert all(len(np.unique(values[:, channel])) <= 16 for channel in range(values.shape[1]))
        seen |= set(values.ravel().tolist())
    assert seen == set(range(-8, 8))


def test_a_large_encoders_images_come_in_small_batches(tmp_path: Path) -> None:
    small, large = tmp_path / "small.onnx", tmp_path / "large.onnx"
    small.write_bytes(b"graph")
    large.write_bytes(b"graph")
    with large.with_name("large.onnx.data").open("wb") as file:
        file.truncate(2**30 + 1)  # weights beside the graph count, too
    assert (images_at_a_time(small), images_at_a_time(large)) == (8, 2)
