"""The project's bars, on the written files, on all 10,000 test images: both minis, both widths."""

from pathlib import Path

import pytest

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.quantization.rewrites.stress import stress_bundle
from d4c_onnx.recipe_file import load_recipe

pytestmark = pytest.mark.slow

# A short schedule keeps the suite fast; the README's table is made with the default one.
SHORT = ("synthesis.images=48", "synthesis.held_out=4", "synthesis.steps=20")
BARS = {"w8a8": 0.5, "w4a8": 1.5}  # points of top-1
BITS = {"w8a8": 8.0, "w4a8": 4.5}  # of integer weights
MEAN_BITS = {"w8a8": 8.2, "w4a8": 4.5}  # of all of them, the final projection's 16 included


@pytest.mark.parametrize("bits", sorted(BARS))
@pytest.mark.parametrize("tower", ["vit", "rn"])
def test_bars(tower: str, bits: str, request: pytest.FixtureRequest) -> None:
    bundle: Bundle = request.getfixturevalue(f"{tower}_bundle")
    recipe = load_recipe(None, [*SHORT, f"quantization.bits={bits}"])
    report = pipeline.quantize_bundle(str(bundle.path), recipe, output=Path("unused"))
    drop = report.top1.fp32 - report.top1.quantized
    assert report.top1.fp32 > 60
    assert drop <= BARS[bits]
    quantization = open_bundle(report.bundle).manifest.quantization
    assert quantization is not None
    layers = [layer for encoder in quantization.encoders.values() for layer in encoder.layers.values()]
    integers = [layer for layer in layers if layer.bits <= 8]
    held = sum(layer.weights for layer in integers)
    assert sum(layer.bits * layer.weights for layer in integers) / held <= BITS[bits]
    # the final projections and a few outlier channels are no integers: 2 % of an encoder's weights at most
    assert held >= 0.98 * sum(layer.weights for layer in layers)
    assert report.weight_bits_average <= MEAN_BITS[bits]
    assert report.size_ratio["total"] >= (6 if bits == "w4a8" else 3.5)
    assert report.accuracy.images == 10_000


def test_a_stress_variant_answers_as_the_model_does(vit_bundle: Bundle, tmp_path: Path) -> None:
    """Channels a hundred times larger in every LayerNorm, value and MLP of both encoders: W4A8 within a point."""
    folder = stress_bundle(vit_bundle, 100, tmp_path / "stressed").path
    recipe = load_recipe(None, [*SHORT, "quantization.bits=w4a8"])
    report = pipeline.quantize_bundle(str(folder), recipe, output=Path("unused"))
    assert report.top1.fp32 > 60
    assert report.top1.fp32 - report.top1.quantized <= 1.0
    assert report.weight_bits_average <= 4.5
