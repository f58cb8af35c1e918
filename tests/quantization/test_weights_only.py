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
from d4c_onnx.calibration import (
    CalibrationSet,
    D4CCalibrationDataReader,
    PromptCalibrationDataReader,
    open_calibration_set,
)
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.bits import average_bits, layer_bits
from d4c_onnx.graph.files import load_graph, save_graph, strip_notes
from d4c_onnx.graph.index import GraphIndex, set_initializer
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.graph.shapes import note_shapes
from d4c_onnx.quantization import quantize_bundle_files, quantize_encoder, write_fp16_bundle
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


@pytest.mark.parametrize("model", ["vit", pytest.param("rn", marks=pytest.mark.slow)])
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
    half = write_fp16_bundle(bundle, tmp_path / "fp16", recipe.quantization, data)
    assert made.manifest.quantization.minimum_onnxruntime == "1.23"
    assert made.manifest.quantization.session.config_entries == {}
    assert not made.manifest.quantization.accuracy_mode_only
    assert "unpacked to float16" in made.manifest.quantization.target_note
    height, width = bundle.manifest.preprocess.size
    feeds = {
        "image": rng.standard_normal((8, 3, height, width), dtype=np.float32),
        "text": np.array([[49406, 320, 1125, 539, 320, 2368, 49407]], np.int64),
    }
    layers = []
    for tower, path in made.encoders.items():
        graph = load_graph(path)
        onnx.checker.check_model(graph)
        layers += layer_bits(graph)
        report = made.manifest.quantization.encoders[path.name]
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
    assert average_bits(layers) == pytest.approx(made.manifest.quantization.weight_bits_average, abs=1e-3)
    assert average_bits(layers) < 4.3
    for layer in inspect_encoder(made.image_encoder).layers:
        assert layer.kernel != "unknown"
        assert layer.activation == "float16"
        if layer.shape:
            assert 0 < layer.weight_scales[0] <= layer.weight_scales[1]
            assert "weights only" in layer.reason


@pytest.mark.parametrize(("model", "tower", "sums"), [("vit", "image", 12), ("vit", "text", 5), ("rn", "text", 5)])
def test_fused_residuals_keep_the_function(
    model: str, tower: str, sums: int, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    changed = load_graph(bundle.encoders[tower])
    before = sum(node.op_type == "LayerNormalization" for node in changed.graph.node)
    note_shapes(changed)
    assert fuse_residuals(changed) == sums
    assert sum(node.op_type == "LayerNormalization" for node in changed.graph.node) == before - sums
    strip_notes(changed)
    onnx.checker.check_model(changed)
    height, width = bundle.manifest.preprocess.size
    batch = rng.standard_normal((3, 3, height, width), dtype=np.float32)
    if tower == "text":
        batch = np.array([[49406, 400, 320, 49407], [49406, 320, 49407, 0]], np.int64)
    exact = EncoderSession(bundle.encoders[tower]).run(batch)
    np.testing.assert_allclose(EncoderSession.of_model(changed).run(batch), exact, atol=2e-6)
    assert fuse_residuals(changed) == 0


def _normed(nodes: list[onnx.NodeProto], shape: list[int | str]) -> onnx.ModelProto:
    """LayerNorm of a value `sum`, made of the input x and constants."""
    constants = {
        "weight": np.eye(8, dtype=np.float32),
        "position": np.ones((3, 8), np.float32),
        "row": np.ones((1, 3, 8), np.float32),
        "scale": np.ones(8, np.float32),
        "bias": np.full(8, 0.5, np.float32),
    }
    graph = helper.make_graph(
        [*nodes, helper.make_node("LayerNormalization", ["sum", "scale", "bias"], ["y"], name="norm")],
        "one",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, shape)],
        [helper.make_tensor_value_info("y", TensorProto.FLOAT, shape)],
        [numpy_helper.from_array(values, name) for name, values in constants.items()],
    )
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)
    note_shapes(model)
    return model


def _sum_of(left: str, right: str, *before: tuple[str, list[str], str]) -> list[onnx.NodeProto]:
    nodes = [helper.make_node(op, inputs, [output], name=output) for op, inputs, output in before]
    return [*nodes, helper.make_node("Add", [left, right], ["sum"], name="sum")]


PRODUCT = ("MatMul", ["x", "weight"], "product")


@pytest.mark.parametrize(
    ("fits", "shape", "nodes"),
    [
        (
            True,
            ["n", 3, 8],
            _sum_of("x2", "y2", ("Neg", ["x"], "x2"), PRODUCT, ("Add", ["bias", "product"], "y2")),
        ),
        (True, ["n", 3, 8], _sum_of("product", "x2", ("Neg", ["x"], "x2"), PRODUCT)),
        # no residual: a bias alone
        (False, ["n", 3, 8], _sum_of("product", "bias", PRODUCT)),
        # position added to tokens, a row for all of the batch, four axes: onnxruntime's operator takes none of them
        (False, ["n", 3, 8], _sum_of("product", "rows", PRODUCT, ("Neg", ["position"], "rows"))),
        (False, ["n", 3, 8], _sum_of("x2", "product", ("Neg", ["x"], "x2"), ("MatMul", ["row", "weight"], "product"))),
        (False, ["n", 3, 3, 8], _sum_of("x2", "product", ("Neg", ["x"], "x2"), PRODUCT)),
    ],
)
def test_only_residuals_are_fused(fits: bool, shape: list[int | str], nodes: list[onnx.NodeProto]) -> None:
    model = _normed(nodes, shape)
    batch = np.random.default_rng(0).standard_normal([2, *shape[1:]]).astype(np.float32)
    exact = EncoderSession(model.SerializeToString()).run(batch)
    assert fuse_residuals(model) == fits
    np.testing.assert_allclose(EncoderSession(model.SerializeToString()).run(batch), exact, atol=1e-6)


@pytest.mark.slow
def test_adaround_knows_float_activations(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    keys = ["bits=w4a16", "target=cuda", "rounding=adaround", "adaround_steps=3"]
    section = load_recipe(None, [f"quantization.{key}" for key in keys]).quantization
    reader = PromptCalibrationDataReader(vit_calibration[1])
    report = quantize_encoder(vit_bundle.text_encoder, tmp_path / "q.onnx", reader, section, threads=1)
    assert {layer.bits for layer in report.layers} == {4, 8}


def test_what_float16_cannot_hold_is_refused(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    """A CPU computes float16 files in float32: only the values themselves tell."""
    model = load_graph(vit_bundle.image_encoder)
    norm = next(node for node in model.graph.node if node.op_type == "LayerNormalization")
    bias = GraphIndex(model.graph).constant(norm.input[2])
    set_initializer(model.graph, norm.input[2], bias + np.float32(1e6))
    save_graph(model, tmp_path / "large.onnx")
    section = load_recipe(None, ["quantization.bits=w4a16", "quantization.target=cuda"]).quantization
    reader = D4CCalibrationDataReader(vit_calibration[1])
    with pytest.raises(GraphError, match="float16 holds 65504"):
        quantize_encoder(tmp_path / "large.onnx", tmp_path / "q.onnx", reader, section, threads=1)
