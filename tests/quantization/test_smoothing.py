"""Smoothing: exact in float, refused where it would not be, and the cure for inflated outlier channels."""

import copy
from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, D4CCalibrationDataReader
from d4c_onnx.graph.files import load_graph
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.smoothing import apply_smoothing, find_smoothable
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession

SECTION = load_recipe(None).quantization


def inflate(model: onnx.ModelProto, factor: float, seed: int = 0) -> onnx.ModelProto:
    """A stress variant: the same function, `factor` times larger in 4 % of each LayerNorm's channels."""
    stressed = copy.deepcopy(model)
    rng = np.random.default_rng(seed)
    for place in find_smoothable(stressed.graph, make_plan(stressed.graph, SECTION).layers):
        width = next(tensor.dims[0] for tensor in stressed.graph.initializer if tensor.name == place.scale)
        scale = np.ones(width, np.float32)
        scale[rng.choice(width, max(1, width // 25), replace=False)] = 1 / factor
        apply_smoothing(stressed.graph, place, scale)
    return stressed


def _cosine(a: np.ndarray, b: np.ndarray) -> float:
    return float((a * b).sum(1).mean())


def test_every_block_has_two_places_and_the_last_norm_is_left_out(vit_bundle: Bundle) -> None:
    graph = load_graph(vit_bundle.image_encoder).graph
    places = find_smoothable(graph, make_plan(graph, SECTION).layers)
    assert [len(place.consumers) for place in places] == [3, 1] * 6
    graph.output.append(onnx.helper.make_tensor_value_info(places[0].output, onnx.TensorProto.FLOAT, None))
    assert len(find_smoothable(graph, make_plan(graph, SECTION).layers)) == len(places) - 1


@given(st.integers(0, 1000), st.floats(0.02, 50))
@settings(max_examples=8, deadline=None)
def test_any_positive_scale_is_exact_in_float(vit_bundle: Bundle, seed: int, spread: float) -> None:
    rng = np.random.default_rng(seed)
    model = load_graph(vit_bundle.image_encoder)
    pixels = rng.standard_normal((2, 3, 48, 48)).astype(np.float32)
    for place in find_smoothable(model.graph, make_plan(model.graph, SECTION).layers):
        apply_smoothing(model.graph, place, np.exp(rng.uniform(-1, 1, 128) * np.log(spread)).astype(np.float32))
    got = EncoderSession(model.SerializeToString()).run(pixels)
    assert np.abs(got - EncoderSession(vit_bundle.image_encoder).run(pixels)).max() <= 1e-4


@pytest.mark.parametrize("factor", [30, 100])
def test_stress_variants_collapse_without_and_hold_with_smoothing(
    factor: int, tmp_path: Path, vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet]
) -> None:
    stressed = inflate(load_graph(vit_bundle.image_encoder), factor)
    onnx.save(stressed, tmp_path / "stressed.onnx")
    pixels = np.array(vit_calibration[1].held_out)
    expected = EncoderSession(vit_bundle.image_encoder).run(pixels)
    assert np.abs(EncoderSession(tmp_path / "stressed.onnx").run(pixels) - expected).max() <= 1e-4

    def quantized(smoothing: str) -> float:
        recipe = load_recipe(None, ["quantization.bits=w8a8", f"quantization.smoothing={smoothing}"])
        reader = D4CCalibrationDataReader(vit_calibration[0])
        report = quantize_encoder(tmp_path / "stressed.onnx", tmp_path / "q.onnx", reader, recipe.quantization)
        assert bool(report.smoothed) == (smoothing == "layer_norm")
        return _cosine(EncoderSession(tmp_path / "q.onnx").run(pixels), expected)

    lost, held = (1 - quantized(smoothing) for smoothing in ("none", "layer_norm"))
    assert lost > 0.005
    assert held < lost / 4
