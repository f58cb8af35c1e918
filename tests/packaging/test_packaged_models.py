"""Packages of real architectures, for every stack: the minis, and a SigLIP in random weights."""

import json
from pathlib import Path

import open_clip
import pytest
from encoders import material, quantized_bundle

from d4c_onnx import pipeline
from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.packaging import STACKS, PackageReport, package_bundle, verify_package
from d4c_onnx.recipe_file import load_recipe

# What these stacks say to a mini, whose images have 48 pixels and whose embeddings have their own length.
REFUSING = {
    "immich": "is not on it",
    "librephotos": "makes images of 224 x 224 pixels",
    "rclip": "makes images of 256 x 256 pixels",
    "frigate": "stores 768 numbers",
}


def _packaged(bundle: Bundle, target: str, output: Path) -> PackageReport:
    """Bit by bit the bundle's answers, which is asserted when a package is written; and whole, as it is read back."""
    report = package_bundle(bundle.path, target, output)
    found = verify_package(report.path)
    assert found.ok, found.checks
    return report


@pytest.mark.slow
@pytest.mark.parametrize("target", STACKS)
@pytest.mark.parametrize("bits", ["w4a8", "w8a8"])
@pytest.mark.parametrize("mini", ["vit", "rn"])
def test_minis_are_packaged(
    mini: str, bits: str, target: str, request: pytest.FixtureRequest, tmp_path_factory: pytest.TempPathFactory
) -> None:
    folder = tmp_path_factory.getbasetemp() / "packaged" / mini / bits
    if not folder.exists():
        bundle, calibration = material(request, mini)
        quantized_bundle(bundle, calibration, folder, f"bits={bits}", "rounding=nearest")
    output = folder.parent / f"{bits}-{target}"
    if target in REFUSING:
        with pytest.raises(BundleError, match=REFUSING[target]):
            package_bundle(folder, target, output)
        return
    report = _packaged(open_bundle(folder), target, output)
    if target == "transformersjs":
        assert {model.io.opset for model in report.content.models} == {18}


SIGLIP = {
    "embed_dim": 96,
    "init_logit_bias": -10,
    "custom_text": True,
    "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
    "text_cfg": {
        **{"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
        **{"no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
    },
}


@pytest.fixture(scope="module")
def siglip(tmp_path_factory: pytest.TempPathFactory) -> Bundle:
    """A SigLIP-like model in random weights at w4a8: a fixed length of texts, padding that is read, a bias."""
    folder = tmp_path_factory.mktemp("siglip")
    (folder / "tiny-sigmoid.json").write_text(json.dumps(SIGLIP))
    open_clip.add_model_config(folder)
    quick = ("images=4", "held_out=2", "batch=2", "steps=1")
    rest = ("text.prompts=16", "text.held_out=4", "quantization.bits=w4a8", "quantization.rounding=nearest")
    recipe = load_recipe(None, [*(f"synthesis.{key}" for key in quick), *rest, "evaluation.dataset=fidelity"])
    return open_bundle(
        pipeline.quantize_bundle("tiny-sigmoid", recipe, output=folder / "to", pretrained="random").bundle
    )


@pytest.mark.slow
@pytest.mark.parametrize("target", STACKS)
def test_a_siglip_like_model_is_packaged(target: str, siglip: Bundle, tmp_path: Path) -> None:
    if target in REFUSING:
        with pytest.raises(BundleError, match=REFUSING[target]):
            package_bundle(siglip.path, target, tmp_path / "out")
        return
    _packaged(siglip, target, tmp_path / "out")
