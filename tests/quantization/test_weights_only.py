"""Weights only, for CUDA: a float16 graph whose integers are unpacked when it is loaded."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import config_of, count, inputs, material, quantize
from graphs import check, ops, parse, run, served
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.graph.model import load_model, save_model
from d4c_onnx.graph.stored import average_bits, find_stored, layer_bits
from d4c_onnx.graph.values import constant, name_of, nodes_of, set_constant
from d4c_onnx.quantization import quantize_bundle_files, write_fp16_bundle
from d4c_onnx.quantization.rounding import METHODS, QuantizedWeight
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.schedule import AdaRoundSchedule
from d4c_onnx.quantization.storage.weights import store_scaled
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession


@given(
    hnp.arrays(np.int8, hnp.array_shapes(min_dims=2, max_dims=4, max_side=5), elements=st.integers(-8, 7)),
    st.integers(0, 3),
    st.sampled_from([4, 8]),
    st.sampled_from(["float", "float16"]),
)
@settings(max_examples=40, deadline=None)
def test_stored_integers_come_back_scaled(values: np.ndarray, axis: int, bits: int, dtype: str) -> None:
    """Any axis of channels, both widths, both float types: onnxruntime reads integer times scale."""
    axis %= values.ndim
    scale = np.linspace(0.25, 1.5, values.shape[axis]).astype(np.float32)
    rows = np.moveaxis(values, axis, 0).reshape(values.shape[axis], -1)
    kind = np.float16 if dtype == "float16" else np.float32
    shape = ", ".join(str(size) for size in values.shape)
    text = f"one ({dtype}[1] x) => ({dtype}[{shape}] y) {{ [add] y = Add(w, x) }}"
    model = parse(text, opset=18, w=np.zeros(values.shape, kind))
    store_scaled(model, {"w": (QuantizedWeight(rows, scale, bits), axis)})
    check(model)
    [add] = nodes_of(model.graph, "Add")
    stored = find_stored(add.inputs[0])
    assert stored is not None
    assert stored.num_bits == bits
    assert stored.initializer.dtype == (ir.DataType.INT4 if bits == 4 else ir.DataType.INT8)
    assert np.array_equal(stored.unpack(), values)
    expected = channels_back(rows * scale[:, None], values.shape, axis).astype(kind)
    assert np.array_equal(run(model, np.zeros(1, kind)), expected)


@pytest.mark.slow
@pytest.mark.parametrize("model", ["vit", "rn"])
def test_a16_answers_as_fp16_does_up_to_its_weights(
    model: str, request: pytest.FixtureRequest, tmp_path: Path, rng: np.random.Generator
) -> None:
    bundle, data = material(request, model)
    recipe = load_recipe(None, ["quantization.bits=w4a16", "quantization.target=cuda"])
    assert recipe.quantization.rounding_method == "yaqa"
    made = quantize_bundle_files(bundle, data, tmp_path / "w4a16", recipe, threads=1)
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
        written = load_model(path)
        check(written)
        layers += layer_bits(written)
        report = made.manifest.quantization.encoders[path.name]
        assert report.quantized_activations == 0
        assert report.smoothing_alpha == {}
        assert report.token_table_bits == (4 if tower == "text" else None)
        assert not {"QuantizeLinear", "DequantizeLinear"} & set(ops(written))
        # once loaded, nothing unpacks: what runs is a float16 file's graph
        kinds = {value.dtype for value in served(written).graph.initializers.values()}
        assert not kinds & {ir.DataType.INT4, ir.DataType.INT8, ir.DataType.UINT8}
        assert ir.DataType.FLOAT16 in kinds or ir.DataType.FLOAT in kinds
        exact = EncoderSession(bundle.encoders[tower]).run(feeds[tower])
        plain, whole = (EncoderSession(found.encoders[tower]).run(feeds[tower]) for found in (half, made))
        assert whole.dtype == np.float32
        assert (exact * plain).sum(-1).min() > 0.99995
        assert (exact * whole).sum(-1).min() > 0.98
        # what was rounded is in the file: float16 alone is much nearer to FP32
        assert np.abs(whole - exact).max() > 10 * np.abs(plain - exact).max()
        assert path.stat().st_size < half.encoders[tower].stat().st_size / 3
    assert average_bits(layers) == pytest.approx(made.manifest.quantization.weight_bits_average, abs=1e-3)
    assert average_bits(layers) <= 4.5
    for layer in inspect_encoder(made.image_encoder).layers:
        assert layer.kernel != "unknown"
        assert layer.activation == "float16"
        if layer.shape:
            assert 0 < layer.weight_scales[0] <= layer.weight_scales[1]
            assert "weights only" in layer.reason


@pytest.mark.parametrize(("model", "tower", "attentions", "sums"), [("vit", "image", 6, 11), ("vit", "text", 3, 4)])
def test_weights_only_files_are_fused_as_fp16_is(
    model: str, tower: str, attentions: int, sums: int, request: pytest.FixtureRequest, tmp_path: Path
) -> None:
    bundle, data = material(request, model)
    keys = ("bits=w8a16", "target=cuda", "rounding=nearest")
    report, written = quantize(bundle.encoders[tower], data, tmp_path / "q.onnx", *keys)
    assert count(report, "attention as one operator") == ops(written).count("MultiHeadAttention") == attentions
    # the last block's first sum is of all rows with the one row's: the two around it are not fused
    assert count(report, "residual") == ops(written).count("SkipLayerNormalization") >= sums
    for batch in inputs(bundle, np.random.default_rng(0))[tower]:
        exact, got = EncoderSession(bundle.encoders[tower]).run(batch), run(written, batch)
        assert (exact * got).sum(-1).min() > 0.999


def test_adaround_knows_float_activations(
    request: pytest.FixtureRequest, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bundle, data = material(request, "vit")
    monkeypatch.setitem(METHODS, "adaround", Reconstruction(AdaRoundSchedule(3, 0.01)))
    keys = ("bits=w4a16", "target=cuda", "rounding=adaround")
    report, _ = quantize(bundle.text_encoder, data, tmp_path / "q.onnx", *keys)
    assert {layer.bits for layer in report.layers} == {4, 8}


def test_what_float16_cannot_hold_is_refused(request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """A CPU computes float16 files in float32: only the values themselves tell."""
    bundle, data = material(request, "vit")
    model = load_model(bundle.image_encoder)
    bias = next(nodes_of(model.graph, "LayerNormalization")).inputs[2]
    assert bias is not None
    set_constant(model.graph, name_of(bias), constant(bias) + np.float32(1e6))
    save_model(model, tmp_path / "large.onnx")
    assert config_of("bits=w4a16", "target=cuda").weights_only
    with pytest.raises(GraphError, match="float16 holds 65504"):
        quantize(tmp_path / "large.onnx", data, tmp_path / "q.onnx", "bits=w4a16", "target=cuda")
