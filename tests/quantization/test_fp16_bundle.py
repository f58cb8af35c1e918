"""The FP16 bundle: it answers as FP32, follows the recipe, and is found again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
import pytest
from encoders import EOT, SOT, config_of, inputs, material
from graphs import check, ops, run

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration import CalibrationSet
from d4c_onnx.errors import GraphError
from d4c_onnx.files import write_json
from d4c_onnx.graph.model import clear_notes, load_model
from d4c_onnx.manifest import Session
from d4c_onnx.quantization import find_fp16_bundle, write_fp16_bundle
from d4c_onnx.quantization.rewrites.float16 import convert_to_float16
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.session import EncoderSession


def test_half_bundle_finds_the_end_token(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    """49405 to 49407 are one number in float16; the end token must be found all the same."""
    half = write_fp16_bundle(vit_bundle, tmp_path / "fp16", load_recipe().quantization, vit_calibration[1])
    ids = np.array([[SOT, 320, 49405, EOT, 0], [SOT, 49405, EOT, 0, 0]], np.int64)
    exact, close = (EncoderSession(bundle.text_encoder).run(ids) for bundle in (vit_bundle, half))
    assert close.dtype == np.float32
    assert (exact * close).sum(-1).min() > 0.9999
    assert half.image_encoder.stat().st_size < 0.55 * vit_bundle.image_encoder.stat().st_size
    manifest = open_bundle(half.path).manifest
    assert manifest.bits == "fp16"
    assert manifest.quantization.session == Session("ORT_ENABLE_ALL", {})
    assert set(manifest.quantization.optimizer_effect) == {"image_encoder.onnx", "text_encoder.onnx"}


@pytest.mark.parametrize("model", ["vit", "rn"])
def test_half_files_are_valid_and_fused(model: str, request: pytest.FixtureRequest, tmp_path: Path) -> None:
    """The converter alone leaves nodes in an order that ONNX forbids."""
    bundle, data = material(request, model)
    made = write_fp16_bundle(bundle, tmp_path / "fp16", config_of(), data)
    kinds: set[str] = set()
    for path in made.encoders.values():
        onnx.checker.check_model(path)
        kinds |= set(ops(load_model(path)))
    assert {"MultiHeadAttention", "SkipLayerNormalization"} <= kinds
    assert "BatchNormalization" not in kinds
    for tower, batches in inputs(bundle, np.random.default_rng(0)).items():
        for batch in batches:
            exact, half = (EncoderSession(found.encoders[tower]).run(batch) for found in (bundle, made))
            assert (exact * half).sum(-1).min() > 0.9998


def test_conversion_to_float16_alone_is_exact_up_to_its_rounding(request: pytest.FixtureRequest) -> None:
    """Without the fusions around it; and the tail, which normalises, stays float32."""
    for model in ("vit", "rn"):
        bundle, _ = material(request, model)
        for tower, batches in inputs(bundle, np.random.default_rng(0)).items():
            converted = convert_to_float16(load_model(bundle.encoders[tower]))
            clear_notes(converted)
            check(converted)
            assert {value.dtype for value in converted.graph.inputs} <= {ir.DataType.FLOAT, ir.DataType.INT64}
            for batch in batches:
                exact, half = EncoderSession(bundle.encoders[tower]).run(batch), run(converted, batch)
                assert half.dtype == np.float32
                np.testing.assert_allclose(np.linalg.norm(half, axis=-1), 1, atol=1e-6)
                assert (exact * half).sum(-1).min() > 0.9998


def test_what_the_converter_refuses_is_an_error_of_ours(vit_bundle: Bundle, monkeypatch: pytest.MonkeyPatch) -> None:
    def refuse(*_: object, **__: object) -> None:
        raise ValueError("no such thing")

    monkeypatch.setattr("d4c_onnx.quantization.rewrites.float16.convert_float_to_float16", refuse)
    with pytest.raises(GraphError, match="no such thing"):
        convert_to_float16(load_model(vit_bundle.image_encoder))


def test_half_bundle_follows_the_recipe_and_is_found_again(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    plain = load_recipe().quantization
    other = load_recipe(None, ["quantization.external_data=true"]).quantization
    assert find_fp16_bundle(vit_bundle, tmp_path / "plain", plain) is None
    whole = write_fp16_bundle(vit_bundle, tmp_path / "plain", plain, vit_calibration[1])
    apart = write_fp16_bundle(vit_bundle, tmp_path / "other", other, vit_calibration[1])
    assert (apart.path / "image_encoder.onnx.data").exists()
    assert not (whole.path / "image_encoder.onnx.data").exists()
    images = np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)
    one, two = (EncoderSession(made.image_encoder).run(images) for made in (whole, apart))
    assert np.array_equal(one, two)
    assert "CUDA" in whole.manifest.quantization.target_note
    assert find_fp16_bundle(vit_bundle, whole.path, plain) is not None
    for bundle, config in ((vit_bundle, other), (replace(vit_bundle, manifest=whole.manifest), plain)):
        assert find_fp16_bundle(bundle, whole.path, config) is None
    manifest = whole.manifest.as_dict()
    other_weights = {**manifest["model"], "weights_sha256": "0" * 64}
    for key, value in (("model", other_weights), ("versions", {**manifest["versions"], "onnx": "1.0"})):
        write_json(whole.path / "manifest.json", {**manifest, key: value})
        assert find_fp16_bundle(vit_bundle, whole.path, plain) is None
    write_json(whole.path / "manifest.json", {**manifest, "versions": {**manifest["versions"], "torch": "1.0"}})
    assert find_fp16_bundle(vit_bundle, whole.path, plain) is not None
    whole.image_encoder.write_bytes(b"damaged")
    assert find_fp16_bundle(vit_bundle, whole.path, plain) is None
