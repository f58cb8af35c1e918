"""Folds: exact in float, and refused where they would not be."""

import copy

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.files import load_graph
from d4c_onnx.graph.index import attribute
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.quantization.folding.batch_norm import fold_batch_norms
from d4c_onnx.quantization.folding.gates import fold_gates
from d4c_onnx.quantization.folding.idle_pools import skip_idle_pools
from d4c_onnx.quantization.folding.patches import unfold_patches
from d4c_onnx.quantization.folding.places import apply_scale, find_places
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession, optimized_graph

SECTION = load_recipe(None).quantization


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
    [place] = find_places(model.graph, tuple(weighted_layers(model.graph)))
    assert place.kind == "activation"  # smoothing can still reach it, at the price of a Mul
    apply_scale(model.graph, place, np.random.default_rng(0).uniform(0.1, 10, width).astype(np.float32))
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
    batch = rng.standard_normal((2, 3, *rn_bundle.manifest.preprocess.size), dtype=np.float32)
    one, other = (EncoderSession(entry.SerializeToString()).run(batch) for entry in (model, changed))
    np.testing.assert_allclose(other, one, atol=1e-6)


def test_a_vit_has_patches_and_a_resnet_has_none(vit_bundle: Bundle, rn_bundle: Bundle) -> None:
    model, changed = load_graph(vit_bundle.image_encoder), load_graph(vit_bundle.image_encoder)
    assert unfold_patches(changed)
    assert len(weighted_layers(changed.graph)) == len(weighted_layers(model.graph))
    assert "Conv" not in {node.op_type for node in changed.graph.node}
    size = vit_bundle.manifest.preprocess.size
    batch = np.random.default_rng(0).standard_normal((3, 3, *size), dtype=np.float32)
    one, other = (EncoderSession(entry.SerializeToString()).run(batch) for entry in (model, changed))
    np.testing.assert_allclose(other, one, atol=2e-6)
    assert not unfold_patches(load_graph(rn_bundle.image_encoder))
