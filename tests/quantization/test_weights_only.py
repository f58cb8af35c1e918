"""Weights only, for CUDA: a float16 graph whose integers are unpacked when it is loaded."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, open_calibration_set
from d4c_onnx.graph.bits import average_bits, layer_bits
from d4c_onnx.graph.files import load_graph
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.quantization import half_bundle_files, quantize_bundle_files
from d4c_onnx.quantization.deployment import fuse_residuals
from d4c_onnx.quantization.layout import store_scaled
from d4c_onnx.quantization.rounding.base import QuantizedWeight
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession, optimized_graph


@given(
    hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.integers(-8, 7)),
    st.integers(0, 3),
    st.sampled_from([4, 8]),
    st.sampled_from([TensorProto.FLOAT, TensorProto.FLOAT16]),
)
@settings(max_examples=40, deadline=None)
def test_stored_integers_come_back_scaled(values: np.ndarray, axis: int, bits: int, dtype: int) -> None:
    """Any axis of channels, both widths, both float types: onnxruntime reads integer times scale."""
    axis %= values.ndim
    scale = np.linspace(0.25, 1.5, values.shape[axis]).astype(np.float32)
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    kind = helper.tensor_dtype_to_np_dtype(dtype)
    model = helper.make_model(
        helper.make_graph(
            [helper.make_node("Add", ["w", "x"], ["y"], name="add")],
            "one",
            [helper.make_tensor_value_info("x", dtype, [1])],
            [helper.make_tensor_value_info("y", dtype, list(values.shape))],
            [numpy_helper.from_array(np.zeros(values.shape, kind), "w")],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    store_scaled(model, {"w": (QuantizedWeight(rows, scale, bits), axis)})
    onnx.checker.check_model(model)
    stored = GraphIndex(model.graph).initializers["w_quantized"]
    assert stored.data_type == (TensorProto.INT4 if bits == 4 else TensorProto.INT8)
    expected = channels_back(rows * scale[:, None], values.shape, axis).astype(kind)
    assert np.array_equal(EncoderSession(model.SerializeToString()).run(np.zeros(1, kind)), expected)


@pytest.mark.parametrize("model", ["vit", "rn"])
def test_a16_answers_as_fp16_does_up_to_its_weights(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    if model == "vit":
        data: CalibrationSet = request.getfixturevalue("vit_calibration")[1]
    else:
        data = open_calibration_set(request.getfixturevalue("rn_calibration"))
    recipe = load_recipe(None, ["quantization.bits=w4a16", "quantization.target=cuda"])
    assert recipe.quantization.rounding_method == "gptaq"
    made = quantize_bundle_files(
        bundle, data, tmp_path / "w4a16", recipe.quantization, recipe_dump=recipe.model_dump(mode="json"), threads=1
    )
    half = half_bundle_files(bundle, tmp_path / "fp16", recipe.quantization)
    assert made.manifest["minimum_onnxruntime"] == "1.23"
    assert made.manifest["session"]["config_entries"] == {}
    assert not made.manifest["accuracy_mode_only"]
    assert "unpacked to float16" in made.manifest["target_note"]
    height, width = bundle.manifest["preprocess"]["size"]
    feeds = {
        "image": rng.standard_normal((8, 3, height, width), dtype=np.float32),
        "text": np.array([[49406, 320, 1125, 539, 320, 2368, 49407]], np.int64),
    }
    layers = []
    for tower, path in made.encoders.items():
        graph = load_graph(path)
        onnx.checker.check_model(graph)
        layers += layer_bits(graph)
        report = made.manifest["encoders"][path.name]
        assert report["quantized_activations"] == 0
        assert report["smoothing_alpha"] == {}
        assert report["token_table_bits"] == (4 if tower == "text" else None)
        assert not {"QuantizeLinear", "DequantizeLinear"} & {node.op_type for node in graph.graph.node}
        # once loaded, nothing unpacks: what runs is a float16 file's graph
        left = GraphIndex(optimized_graph(path).graph)
        assert not any(name.endswith(("_quantized", "_integers")) for name in {*left.initializers, *left.producer})
        exact = EncoderSession(bundle.encoders[tower]).run(feeds[tower])
        plain, whole = (EncoderSession(found.encoders[tower]).run(feeds[tower]) for found in (half, made))
        assert whole.dtype == np.float32
        assert (exact * plain).sum(-1).min() > 0.99995
        assert 0.98 < (exact * whole).sum(-1).min() < 0.99999
        assert path.stat().st_size < half.encoders[tower].stat().st_size / 3
    assert average_bits(layers) == pytest.approx(made.manifest["weight_bits_average"], abs=1e-3)
    assert average_bits(layers) < 4.3
    for layer in inspect_encoder(made.image_encoder).layers:
        if layer.shape and layer.op != "Conv":
            assert layer.activation == "float16"
            assert 0 < layer.weight_scales[0] <= layer.weight_scales[1]
            assert "weights only" in layer.reason


@pytest.mark.parametrize(("model", "tower", "sums"), [("vit", "image", 12), ("vit", "text", 5), ("rn", "text", 5)])
def test_fused_residuals_keep_the_function(
    model: str, tower: str, sums: int, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    changed = load_graph(bundle.encoders[tower])
    before = sum(node.op_type == "LayerNormalization" for node in changed.graph.node)
    assert fuse_residuals(changed) == sums
    assert sum(node.op_type == "LayerNormalization" for node in changed.graph.node) == before - sums
    onnx.checker.check_model(changed)
    height, width = bundle.manifest["preprocess"]["size"]
    batch = rng.standard_normal((3, 3, height, width), dtype=np.float32)
    if tower == "text":
        batch = np.array([[49406, 400, 320, 49407], [49406, 320, 49407, 0]], np.int64)
    exact = EncoderSession(bundle.encoders[tower]).run(batch)
    np.testing.assert_allclose(EncoderSession.of_model(changed).run(batch), exact, atol=2e-6)
    assert fuse_residuals(changed) == 0


def test_a_sum_that_is_no_residual_stays() -> None:
    """Position added to tokens: one of the two has no batch axis, and onnxruntime's operator would refuse it."""
    width = 8
    constants = {
        "position": np.ones((3, width), np.float32),
        "scale": np.ones(width, np.float32),
        "bias": np.zeros(width, np.float32),
    }
    model = helper.make_model(
        helper.make_graph(
            [
                helper.make_node("Neg", ["position"], ["rows"]),
                helper.make_node("Neg", ["x"], ["tokens"]),
                helper.make_node("Add", ["tokens", "rows"], ["sum"], name="sum"),
                helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["y"], name="norm"),
            ],
            "one",
            [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["n", 3, width])],
            [helper.make_tensor_value_info("y", TensorProto.FLOAT, ["n", 3, width])],
            [numpy_helper.from_array(values, name) for name, values in constants.items()],
        ),
        opset_imports=[helper.make_opsetid("", 18)],
        ir_version=8,
    )
    assert fuse_residuals(model) == 0
    assert [node.op_type for node in model.graph.node] == ["Neg", "Neg", "Add", "LayerNormalization"]
