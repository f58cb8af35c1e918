"""The FP16 bundle: it answers as FP32, follows the recipe, and is found again."""

from dataclasses import replace
from pathlib import Path

import numpy as np
import onnx
import pytest

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.calibration import CalibrationSet, open_calibration_set
from d4c_onnx.files import write_json
from d4c_onnx.graph.files import load_graph
from d4c_onnx.manifest import Session
from d4c_onnx.quantization import find_fp16_bundle, write_fp16_bundle
from d4c_onnx.recipe import load_recipe
from d4c_onnx.runtime.session import EncoderSession

SOT, EOT = 49406, 49407


def test_fp16_bundle_finds_the_end_token(
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
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    calibration = request.getfixturevalue(f"{model}_calibration")
    data = calibration[1] if model == "vit" else open_calibration_set(calibration)
    plain = ["quantization.fused_attention=false", "quantization.fused_residuals=false"]
    fused, other = (
        write_fp16_bundle(bundle, tmp_path / name, load_recipe(None, keys).quantization, data)
        for name, keys in (("fused", ["quantization.target=cuda"]), ("plain", plain))
    )
    for made in (fused, other):
        for path in made.encoders.values():
            onnx.checker.check_model(path)
    kinds = {
        made.path.name: {node.op_type for path in made.encoders.values() for node in load_graph(path).graph.node}
        for made in (fused, other)
    }
    assert {"MultiHeadAttention", "SkipLayerNormalization"} <= kinds["fused"]
    assert not {"MultiHeadAttention", "SkipLayerNormalization"} & kinds["plain"]
    assert not any("BatchNormalization" in found for found in kinds.values())
    height, width = bundle.manifest.preprocess.size
    images = np.random.default_rng(0).standard_normal((4, 3, height, width)).astype(np.float32)
    exact, *halves = (EncoderSession(made.image_encoder).run(images) for made in (bundle, fused, other))
    assert all((exact * half).sum(-1).min() > 0.99995 for half in halves)


def test_fp16_bundle_follows_the_recipe_and_is_found_again(
    vit_bundle: Bundle, vit_calibration: tuple[Path, CalibrationSet], tmp_path: Path
) -> None:
    plain = load_recipe().quantization
    other = load_recipe(None, ["quantization.pooled_row_only=false", "quantization.external_data=true"]).quantization
    assert find_fp16_bundle(vit_bundle, tmp_path / "plain", plain) is None
    one_row = write_fp16_bundle(vit_bundle, tmp_path / "plain", plain, vit_calibration[1])
    all_rows = write_fp16_bundle(vit_bundle, tmp_path / "other", other, vit_calibration[1])
    assert (all_rows.path / "image_encoder.onnx.data").exists()
    nodes = [len(load_graph(made.image_encoder).graph.node) for made in (one_row, all_rows)]
    assert nodes[0] != nodes[1]
    images = np.random.default_rng(0).standard_normal((4, 3, 48, 48)).astype(np.float32)
    one, all_of_them = (EncoderSession(made.image_encoder).run(images) for made in (one_row, all_rows))
    np.testing.assert_allclose(one, all_of_them, atol=2e-3)
    assert "CUDA" in one_row.manifest.quantization.target_note
    assert find_fp16_bundle(vit_bundle, one_row.path, plain) is not None
    for bundle, section in ((vit_bundle, other), (replace(vit_bundle, manifest=one_row.manifest), plain)):
        assert find_fp16_bundle(bundle, one_row.path, section) is None
    manifest = one_row.manifest.as_dict()
    other_weights = {**manifest["model"], "weights_sha256": "0" * 64}
    for key, value in (("model", other_weights), ("versions", {**manifest["versions"], "onnx": "1.0"})):
        write_json(one_row.path / "manifest.json", {**manifest, key: value})
        assert find_fp16_bundle(vit_bundle, one_row.path, plain) is None
    write_json(one_row.path / "manifest.json", {**manifest, "versions": {**manifest["versions"], "torch": "1.0"}})
    assert find_fp16_bundle(vit_bundle, one_row.path, plain) is not None
    one_row.image_encoder.write_bytes(b"damaged")
    assert find_fp16_bundle(vit_bundle, one_row.path, plain) is None
