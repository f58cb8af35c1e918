"""Smoothing: exact at its places, refused elsewhere, and the cure for inflated outlier channels."""

import tracemalloc
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.graph.files import load_graph, raise_opset
from d4c_onnx.graph.index import GraphIndex, drop_unused, set_initializer
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.folding import smoothing
from d4c_onnx.quantization.folding.gates import fold_gates
from d4c_onnx.quantization.folding.places import Place, apply_scale, find_places
from d4c_onnx.quantization.folding.stress import inflate
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession

SECTION = load_recipe(None).quantization


def _places(model: onnx.ModelProto) -> list[Place]:
    return find_places(model.graph, tuple(weighted_layers(model.graph)))


def _kinds(model: onnx.ModelProto) -> dict[str, int]:
    kinds = [place.kind for place in _places(model)]
    return {kind: kinds.count(kind) for kind in sorted(set(kinds))}


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).mean())


def test_every_block_has_four_places_and_the_last_norm_is_left_out(vit_bundle: Bundle, rn_bundle: Bundle) -> None:
    model = load_graph(vit_bundle.image_encoder)
    assert _kinds(model) == {"layer_norm": 12, "quick_gelu": 6, "value": 6}
    shared = [len(place.consumers) for place in _places(model) if place.kind == "layer_norm"]
    assert shared == [3, 1] * 6
    assert _kinds(load_graph(vit_bundle.text_encoder)) == {"layer_norm": 7, "quick_gelu": 3, "value": 3}
    assert _kinds(load_graph(rn_bundle.image_encoder)) == {"value": 1}


@pytest.mark.parametrize("kind", ["layer_norm", "quick_gelu", "value"])
def test_a_value_that_something_else_reads_is_no_place(kind: str, vit_bundle: Bundle) -> None:
    model = load_graph(vit_bundle.image_encoder)
    before = _places(model)
    place = next(place for place in before if place.kind == kind)
    model.graph.output.append(helper.make_tensor_value_info(place.output, TensorProto.FLOAT, None))
    assert len(_places(model)) == len(before) - 1


def test_a_weight_that_two_nodes_share_is_no_place(vit_bundle: Bundle) -> None:
    model = load_graph(vit_bundle.image_encoder)
    before = _places(model)
    value = next(place for place in before if place.kind == "value")
    extra = helper.make_node("Identity", [value.shrunk[0][0]], ["copy_of_v"], name="copy_of_v")
    model.graph.node.append(extra)
    model.graph.output.append(helper.make_tensor_value_info("copy_of_v", TensorProto.FLOAT, None))
    # v's weight is read by v alone no more: neither v -> out_proj nor the LayerNorm before v may touch it
    assert len(_places(model)) == len(before) - 2


@pytest.mark.parametrize("shape", [(4, 5), (2, 8, 3)], ids=["weight on the left", "batched weight"])
def test_products_whose_channels_lie_elsewhere_are_no_place(shape: tuple[int, ...]) -> None:
    inputs = ["w", "x"] if len(shape) == 2 else ["x", "w"]
    nodes = [
        helper.make_node("LayerNormalization", ["u", "g", "b"], ["x"], name="norm"),
        helper.make_node("MatMul", inputs, ["y"], name="product"),
    ]
    constants = {"g": np.ones(8, np.float32), "b": np.zeros(8, np.float32), "w": np.ones(shape, np.float32)}
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("u", TensorProto.FLOAT, [2, 5, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, None)],
        [numpy_helper.from_array(value, name) for name, value in constants.items()],
    )
    assert find_places(graph, tuple(weighted_layers(graph))) == []


@given(st.integers(0, 1000), st.floats(0.02, 50))
@settings(max_examples=6, deadline=None)
def test_any_positive_scale_is_exact_in_float(vit_bundle: Bundle, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    model = load_graph(vit_bundle.image_encoder)
    pixels = rng.standard_normal((2, 3, 48, 48)).astype(np.float32)
    for place in _places(model):
        apply_scale(model.graph, place, np.exp(rng.uniform(-1, 1, place.width) * np.log(spread)).astype(np.float32))
    assert _kinds(model) == {"layer_norm": 12, "quick_gelu": 6, "value": 6}  # still recognised after the rewrite
    got = EncoderSession(model.SerializeToString()).run(pixels)
    assert np.abs(got - EncoderSession(vit_bundle.image_encoder).run(pixels)).max() <= 1e-4


def test_gelu_takes_its_scale_from_a_mul_and_keeps_it_there() -> None:
    """Gelu has no exact inner fold: a Mul goes behind it, and a second scale goes into that Mul."""
    rng = np.random.default_rng(0)
    first, second = (rng.standard_normal(shape).astype(np.float32) for shape in ((8, 16), (16, 4)))
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["h"], name="c_fc"),
        helper.make_node("Gelu", ["h"], ["g"], name="gelu"),
        helper.make_node("MatMul", ["g", "second"], ["y"], name="c_proj"),
    ]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 4])],
        [numpy_helper.from_array(first, "first"), numpy_helper.from_array(second, "second")],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)
    x = rng.standard_normal((5, 8)).astype(np.float32)
    expected = EncoderSession(model.SerializeToString()).run(x)
    for kind in ("activation", "mul"):
        assert _kinds(model) == {kind: 1}
        apply_scale(model.graph, _places(model)[0], rng.uniform(0.1, 10, 16).astype(np.float32))
        onnx.checker.check_model(model)
        assert np.allclose(EncoderSession(model.SerializeToString()).run(x), expected, rtol=1e-4, atol=1e-4)
    assert sum(node.op_type == "Mul" for node in model.graph.node) == 1


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("factor", [pytest.param(30, marks=pytest.mark.slow), 100])
def test_stress_variants_collapse_without_and_hold_with_smoothing(
    factor: int, tower: str, tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    path = vit_bundle.encoders[tower]
    onnx.save(inflate(load_graph(path), factor), tmp_path / "stressed.onnx")
    reader_of = D4CCalibrationDataReader if tower == "image" else PromptCalibrationDataReader
    feeds = [np.array(vit_calibration[1].held_out)]
    if tower == "text":
        reader, feeds = reader_of(vit_calibration[0]), []
        while (feed := reader.get_next()) is not None:
            feeds.append(feed["input_ids"])

    def embeds(file: Path) -> np.ndarray:
        session = EncoderSession(file)
        return np.concatenate([session.run(feed) for feed in feeds])

    expected = embeds(path)
    assert np.abs(embeds(tmp_path / "stressed.onnx") - expected).max() <= 1e-4

    def lost(smoothing: str) -> float:
        recipe = load_recipe(None, ["quantization.bits=w8a8", f"quantization.smoothing={smoothing}"])
        reader = reader_of(vit_calibration[0])
        report = quantize_encoder(tmp_path / "stressed.onnx", tmp_path / "q.onnx", reader, recipe.quantization)
        assert bool(report.smoothed) == (smoothing != "none")
        return 1 - _cosine(embeds(tmp_path / "q.onnx"), expected)

    none, layer_norm, every = (lost(smoothing) for smoothing in ("none", "layer_norm", "all"))
    assert none > 0.001
    assert every < none / 20
    assert every < layer_norm


def _outlying_mlp(path: Path, factor: float, gelu: bool) -> onnx.ModelProto:
    """An image encoder whose c_fc makes a few channels `factor` times as large, and whose c_proj takes that back: not
    the same function, but that of a trained one with outliers behind its activations."""
    model = load_graph(path)
    rng = np.random.default_rng(0)
    for place in _places(model):
        if place.kind != "quick_gelu":
            continue
        index = GraphIndex(model.graph)
        scale = np.ones(place.width, np.float32)
        scale[rng.choice(place.width, place.width // 25, replace=False)] = factor
        for name, _ in place.shrunk:  # [width, channels] and [channels]
            set_initializer(model.graph, name, index.constant(name) * scale)
        weight = place.consumers[0].weight
        set_initializer(model.graph, weight, index.constant(weight) / scale[:, None])
        if gelu:
            node = next(node for node in model.graph.node if node.name == place.node)
            hidden = next(name for name in node.input if index.producer[name].op_type != "Sigmoid")
            node.CopyFrom(helper.make_node("Gelu", [hidden], [node.output[0]], name=node.name))
    drop_unused(model.graph)
    raise_opset(model, 20)
    return model


@pytest.mark.parametrize("gelu", [False, True], ids=["quick_gelu", "gelu"])
@pytest.mark.parametrize("bits", ["w4a8", pytest.param("w8a8", marks=pytest.mark.slow)])
def test_outliers_behind_activations_are_smoothed(
    bits: str, gelu: bool, tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    """At 4 bits, too, where the rounding of the weights leaves an error that no smoothing takes away."""
    path = tmp_path / "outliers.onnx"
    onnx.save(_outlying_mlp(vit_bundle.image_encoder, 20, gelu), path)
    images = np.array(vit_calibration[1].held_out)
    expected = EncoderSession(path).run(images)

    def lost(smoothing: str) -> tuple[float, int]:
        keys = [f"quantization.{key}" for key in (f"bits={bits}", "rounding=nearest", f"smoothing={smoothing}")]
        reader = D4CCalibrationDataReader(vit_calibration[0])
        report = quantize_encoder(path, tmp_path / "q.onnx", reader, load_recipe(None, keys).quantization)
        return 1 - _cosine(EncoderSession(tmp_path / "q.onnx").run(images), expected), len(report.smoothed)

    (without, _), (smoothed, places) = lost("layer_norm"), lost("all")
    assert places >= 6
    assert smoothed < without / 3


def test_a_layer_of_equal_weights_is_not_smoothed(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    """Random layers are uniform: a grid that clips them would make any other scale look better."""
    model = load_graph(vit_bundle.image_encoder)
    rng = np.random.default_rng(0)
    for place in _places(model):
        for layer in place.consumers:
            shape = GraphIndex(model.graph).constant(layer.weight).shape
            set_initializer(model.graph, layer.weight, rng.uniform(-0.05, 0.05, shape).astype(np.float32))
    reader = D4CCalibrationDataReader(vit_calibration[0])
    fold_gates(model)
    assert not smoothing.smooth(model, make_plan(model.graph, SECTION), reader, SECTION)


def test_what_smoothing_remembers_of_a_batch_is_small() -> None:
    """A view of some rows would keep all batches of all places alive: 22 GB for a ViT-L/14 and 128 images."""
    seen: dict = {}
    tracemalloc.start()
    try:
        for _ in range(10):
            smoothing._observe(seen, "x", np.ones((2000, 64), np.float32))  # half a megabyte each
        left, _ = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert left < 200_000
    assert sum(len(rows) for rows in seen["x"].rows) == 160


def test_smoothing_judges_on_the_grid_that_will_be_served(rng: np.random.Generator) -> None:
    """Behind a ReLU a symmetric grid has half the steps for what is there, and twice the error."""
    rows = np.abs(rng.normal(size=(64, 16))).astype(np.float32)
    seen = smoothing._Seen(rows.min(0), rows.max(0), [rows])
    weights = [(rng.normal(size=(8, 16)).astype(np.float32), 8)]
    errors = [
        smoothing._error(rows, seen, weights, np.ones(16, np.float32), load_recipe(None, sets).quantization)
        for sets in (["quantization.bits=w8a6"], ["quantization.bits=w8a6", "quantization.target=tensorrt"])
    ]
    assert errors[1] > 2.5 * errors[0]
