"""Folds: exact in float, refused where they would not be, and the cure for inflated outlier channels."""

import copy
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
from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, set_initializer
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.folding import smoothing
from d4c_onnx.quantization.folding.batch_norm import fold_batch_norms
from d4c_onnx.quantization.folding.gates import fold_gates
from d4c_onnx.quantization.folding.idle_pools import skip_idle_pools
from d4c_onnx.quantization.folding.patches import unfold_patches
from d4c_onnx.quantization.folding.places import Place, apply_scale, find_places
from d4c_onnx.quantization.folding.start_token import dead_start_rows, pin_start_token
from d4c_onnx.quantization.folding.stress import inflate
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession, optimized_graph

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
def test_quick_gelu_loses_its_constant_exactly(tower: str, vit_bundle: Bundle, rng: np.random.Generator) -> None:
    model = load_graph(vit_bundle.encoders[tower])
    blocks = sum(node.op_type == "Sigmoid" for node in model.graph.node)
    muls = sum(node.op_type == "Mul" for node in model.graph.node)
    assert fold_gates(model) == blocks > 0
    onnx.checker.check_model(model)
    assert sum(node.op_type == "Mul" for node in model.graph.node) == muls - blocks
    assert fold_gates(model) == 0
    batch = rng.standard_normal((3, 3, 48, 48)).astype(np.float32)
    if tower == "text":
        batch = np.array([[49406, 320, 1125, 539, 49407], [49406, 320, 49407, 0, 0]], np.int64)
    served = optimized_graph(model.SerializeToString())
    gelus = [node for node in served.graph.node if node.op_type == "QuickGelu"]
    assert [attribute(node, "alpha") for node in gelus] == [1.0] * blocks
    got = EncoderSession(model.SerializeToString()).run(batch)
    np.testing.assert_allclose(got, EncoderSession(vit_bundle.encoders[tower]).run(batch), atol=2e-6)


def _quick_gelu(width: int, constant: np.ndarray, shared: bool = False) -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    values = {"first": rng.standard_normal((8, width)), "bias": rng.standard_normal(width)}
    values |= {"second": rng.standard_normal((width, 4)), "a": constant}
    nodes = [
        helper.make_node("MatMul", ["x", "first"], ["p"], name="c_fc"),
        helper.make_node("Add", ["bias", "p"], ["h"], name="add"),
        helper.make_node("Mul", ["a", "h"], ["m"], name="gate"),
        helper.make_node("Sigmoid", ["m"], ["s"], name="sigmoid"),
        helper.make_node("Mul", ["h", "s"], ["g"], name="product"),
        helper.make_node("MatMul", ["g", "second"], ["y"], name="c_proj"),
    ]
    outputs = ["y", "h"] if shared else ["y"]
    graph = helper.make_graph(
        nodes,
        "mlp",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 8])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, None) for name in outputs],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in values.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 20)], ir_version=9)


@given(st.floats(0.05, 20), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_any_positive_constant_folds(constant: float, width: int) -> None:
    model = _quick_gelu(width, np.array(constant))
    x = np.random.default_rng(width).standard_normal((5, 8)).astype(np.float32)
    expected = EncoderSession(model.SerializeToString()).run(x)
    assert fold_gates(model) == 1
    np.testing.assert_allclose(EncoderSession(model.SerializeToString()).run(x), expected, rtol=1e-4, atol=1e-4)
    assert _kinds(model) == {"activation": 1}  # smoothing can still reach it, at the price of a Mul
    apply_scale(model.graph, _places(model)[0], np.random.default_rng(0).uniform(0.1, 10, width).astype(np.float32))
    np.testing.assert_allclose(EncoderSession(model.SerializeToString()).run(x), expected, rtol=1e-4, atol=1e-4)


def test_constants_that_do_not_fold_stay() -> None:
    for model in (
        _quick_gelu(16, np.linspace(1, 2, 16)),  # a stress variant's
        _quick_gelu(16, np.array(-1.702)),
        _quick_gelu(16, np.array(1.702), shared=True),  # another reader would get 1.702 h
    ):
        before = model.SerializeToString()
        assert fold_gates(model) == 0
        assert model.SerializeToString() == before


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_exactly(bias: bool) -> None:
    rng = np.random.default_rng(1)
    weight = rng.standard_normal((6, 3, 3, 3)).astype(np.float32)
    constants = {"w": weight, "g": rng.uniform(0.5, 2, 6), "b": rng.standard_normal(6)}
    constants |= {"m": rng.standard_normal(6), "v": rng.uniform(0.1, 2, 6), "c": rng.standard_normal(6)}
    nodes = [
        helper.make_node("Conv", ["x", "w", "c"] if bias else ["x", "w"], ["u"], name="conv", pads=[1] * 4),
        helper.make_node("BatchNormalization", ["u", "g", "b", "m", "v"], ["y"], name="norm", epsilon=1e-3),
    ]
    graph = helper.make_graph(
        nodes,
        "g",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, [2, 3, 8, 8])],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, [2, 6, 8, 8])],
        [numpy_helper.from_array(value.astype(np.float32), name) for name, value in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    x = rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
    expected = EncoderSession(model.SerializeToString()).run(x)
    branched = copy.deepcopy(model)
    branched.graph.output.append(helper.make_tensor_value_info("u", TensorProto.FLOAT, None))
    assert fold_batch_norms(branched) == 0  # the convolution's own output is asked for
    assert fold_batch_norms(model) == 1
    assert [node.op_type for node in model.graph.node] == ["Conv"]
    onnx.checker.check_model(model)
    assert np.allclose(EncoderSession(model.SerializeToString()).run(x), expected, atol=1e-4)


def _patch_model(weight: np.ndarray, bias: np.ndarray | None, size: tuple[int, int], **attributes) -> onnx.ModelProto:
    """What a ViT begins with: pixel_values -> Conv -> [batch, channels, patches] -> [batch, patches, channels]."""
    names = ["w"] if bias is None else ["w", "b"]
    arrays = {"w": weight, "shape": np.array([0, len(weight), -1], np.int64)} | ({} if bias is None else {"b": bias})
    nodes = [
        helper.make_node("Conv", ["pixel_values", *names], ["map"], "patches", **attributes),
        helper.make_node("Reshape", ["map", "shape"], ["flat"], "flat"),
        helper.make_node("Transpose", ["flat"], ["tokens"], "turn", perm=[0, 2, 1]),
    ]
    graph = helper.make_graph(
        nodes,
        "vit",
        [helper.make_tensor_value_info("pixel_values", TensorProto.FLOAT, ["batch", weight.shape[1], *size])],
        [helper.make_tensor_value_info("tokens", TensorProto.FLOAT, ["batch", None, None])],
        [numpy_helper.from_array(array, name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


@given(st.tuples(st.integers(1, 4), st.integers(1, 4)), st.tuples(st.integers(1, 3), st.integers(1, 3)), st.booleans())
@settings(max_examples=15, deadline=None)
def test_patches_unfold_exactly(kernel: tuple[int, int], grid: tuple[int, int], with_bias: bool) -> None:
    """Oblong patches and grids included."""
    rng = np.random.default_rng(0)
    weight = rng.standard_normal((5, 3, *kernel), dtype=np.float32)
    bias = rng.standard_normal(5, dtype=np.float32) if with_bias else None
    size = (kernel[0] * grid[0], kernel[1] * grid[1])
    plain, changed = (_patch_model(weight, bias, size, kernel_shape=kernel, strides=kernel) for _ in range(2))
    assert unfold_patches(changed)
    onnx.checker.check_model(changed)
    assert [layer.op for layer in weighted_layers(changed.graph)] == ["MatMul"]
    batch = rng.standard_normal((2, 3, *size), dtype=np.float32)
    one, other = (EncoderSession(model.SerializeToString()).run(batch) for model in (plain, changed))
    np.testing.assert_allclose(other, one, atol=1e-5)


@pytest.mark.parametrize(
    ("size", "attributes"),
    [
        ((8, 8), {"strides": [2, 2]}),  # patches overlap
        ((8, 8), {"strides": [4, 4], "pads": [1, 1, 1, 1]}),
        ((8, 10), {"strides": [4, 4]}),  # the last columns belong to no patch
        ((8, 8), {"strides": [4, 4], "auto_pad": "SAME_UPPER"}),
    ],
)
def test_other_convolutions_are_no_patches(size: tuple[int, int], attributes: dict) -> None:
    model = _patch_model(np.ones((5, 3, 4, 4), np.float32), None, size, kernel_shape=[4, 4], **attributes)
    before = model.SerializeToString()
    assert not unfold_patches(model)
    assert model.SerializeToString() == before


def test_a_pool_of_single_values_is_skipped(rn_bundle: Bundle, rng: np.random.Generator) -> None:
    """The first stage has one; the others average 2 x 2 values and stay."""
    model, changed = load_graph(rn_bundle.image_encoder), load_graph(rn_bundle.image_encoder)
    assert skip_idle_pools(changed) == 1
    pools = [[node.op_type for node in entry.graph.node].count("AveragePool") for entry in (model, changed)]
    assert pools[1] == pools[0] - 1 > 0
    batch = rng.standard_normal((2, 3, *rn_bundle.manifest["preprocess"]["size"]), dtype=np.float32)
    one, other = (EncoderSession(entry.SerializeToString()).run(batch) for entry in (model, changed))
    np.testing.assert_allclose(other, one, atol=1e-6)


def test_a_vit_has_patches_and_a_resnet_has_none(vit_bundle: Bundle, rn_bundle: Bundle) -> None:
    model, changed = load_graph(vit_bundle.image_encoder), load_graph(vit_bundle.image_encoder)
    assert unfold_patches(changed)
    assert len(weighted_layers(changed.graph)) == len(weighted_layers(model.graph))
    assert "Conv" not in {node.op_type for node in changed.graph.node}
    size = vit_bundle.manifest["preprocess"]["size"]
    batch = np.random.default_rng(0).standard_normal((3, 3, *size), dtype=np.float32)
    one, other = (EncoderSession(entry.SerializeToString()).run(batch) for entry in (model, changed))
    np.testing.assert_allclose(other, one, atol=2e-6)
    assert not unfold_patches(load_graph(rn_bundle.image_encoder))


@pytest.mark.parametrize("tower", ["image", "text"])
@pytest.mark.parametrize("factor", [30, 100])
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
@pytest.mark.parametrize("bits", ["w4a8", "w8a8"])
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


def _prompts(calibration: tuple[Path, CalibrationSet]) -> PromptCalibrationDataReader:
    return PromptCalibrationDataReader(calibration[0])


def _outlying_start(path: Path) -> onnx.ModelProto:
    """A text encoder with the massive activation of real CLIPs: one hidden channel of the first MLP, for the start
    token alone, is a hundred times larger than everything else."""
    model = load_graph(path)
    index = GraphIndex(model.graph)
    hidden = next(place for place in _places(model) if place.kind == "quick_gelu")
    (weight, axis), (bias, _) = hidden.shrunk
    norm = next(place for place in _places(model) if place.consumers[0].weight == weight)
    values = {name: index.array(name).copy() for name in ("positional_embedding", weight, bias, norm.shrunk[0][0])}
    values["positional_embedding"][0, 0] = 1000  # the LayerNorm turns it into the square root of the width, 8
    values[norm.shrunk[0][0]][0] = 1
    assert axis == 1
    values[weight][:, 0] = 0
    values[weight][0, 0] = 60
    values[bias][0] = -250  # no other token gets above zero here
    for name, array in values.items():
        set_initializer(model.graph, name, array)
    return model


def test_pinning_the_start_token_is_exact_and_makes_its_row_dead(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    model = load_graph(vit_bundle.text_encoder)
    plan = make_plan(model.graph, SECTION)
    pinned = copy.deepcopy(model)
    assert pin_start_token(pinned, plan, _prompts(vit_calibration)) == 2 * 3  # keys and values of three blocks
    ids = np.array([row for row in vit_calibration[1].input_ids if len(row) == 8], np.int64)
    other = ids.copy()
    other[:, 0] = 7
    plain, changed = EncoderSession(model.SerializeToString()), EncoderSession(pinned.SerializeToString())
    assert np.abs(changed.run(ids) - plain.run(ids)).max() <= 1e-5
    assert np.array_equal(changed.run(other), changed.run(ids))
    assert np.abs(plain.run(other) - plain.run(ids)).max() > 1e-4


def test_start_token_is_pinned_where_it_is_an_outlier_only(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    keep, auto = (
        load_recipe(None, [f"quantization.start_token={s}", "quantization.bits=w8a8"]).quantization
        for s in ("keep", "auto")
    )
    calm, outlying = load_graph(vit_bundle.text_encoder), _outlying_start(vit_bundle.text_encoder)
    reader = _prompts(vit_calibration)
    assert not dead_start_rows(outlying, make_plan(outlying.graph, keep), reader, keep)
    assert dead_start_rows(outlying, make_plan(outlying.graph, auto), reader, auto)
    images = load_graph(vit_bundle.image_encoder)
    forced = load_recipe(None, ["quantization.start_token=pin"]).quantization
    image_reader = D4CCalibrationDataReader(vit_calibration[0])
    assert not dead_start_rows(images, make_plan(images.graph, forced), image_reader, forced)
    # a prompt that begins otherwise: nothing is constant, nothing is pinned

    class Mixed(PromptCalibrationDataReader):
        def get_next(self):
            feed = super().get_next()
            if feed is not None:
                feed["input_ids"] = feed["input_ids"].copy()
                feed["input_ids"][::2, 0] = 5
            return feed

    assert not dead_start_rows(outlying, make_plan(outlying.graph, forced), Mixed(vit_calibration[0]), forced)
    assert dead_start_rows(calm, make_plan(calm.graph, forced), reader, forced)


def test_pinning_saves_the_answers_of_an_encoder_with_an_outlying_start_token(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    model = _outlying_start(vit_bundle.text_encoder)
    onnx.save(model, tmp_path / "outlying.onnx")
    ids = np.array([row for row in vit_calibration[1].input_ids if len(row) == 8], np.int64)
    expected = EncoderSession(tmp_path / "outlying.onnx").run(ids)
    errors = {}
    for mode in ("keep", "pin"):
        recipe = load_recipe(
            None, ["quantization.bits=w8a8", "quantization.smoothing=none", f"quantization.start_token={mode}"]
        )
        target = tmp_path / f"{mode}.onnx"
        report = quantize_encoder(tmp_path / "outlying.onnx", target, _prompts(vit_calibration), recipe.quantization)
        assert report.start_token_pinned == (mode == "pin")
        errors[mode] = 1 - _cosine(EncoderSession(target).run(ids), expected)
    assert errors["pin"] < errors["keep"] / 2


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
