"""Other families of CLIPs than the minis, as small as they get, with random weights: all the way to int8 kernels."""

import importlib
import json
from pathlib import Path
from types import ModuleType

import numpy as np
import open_clip
import pytest
from miniatures import TEXT_TOWER, add_miniatures

from d4c_onnx import pipeline
from d4c_onnx.bundle import open_bundle
from d4c_onnx.calibration import open_calibration_set
from d4c_onnx.models.load import load_model
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.recipe_file import load_recipe
from d4c_onnx.runtime.inspection import inspect_encoder
from d4c_onnx.runtime.session import EncoderSession, optimized_graph
from d4c_onnx.runtime.tokenizer import TextTokenizer

TEXT = {"context_length": 12, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 32, "head_width": 16, "patch_size": 8}
POOLER = {"attentional_pool": True, "attn_pooler_heads": 2, "attn_pooler_queries": 4}
FAMILIES: dict[str, dict] = {
    # CoCa: an attention pooler, tokens beside the embedding, a class token behind the text and a mask for each text
    "tiny-coca": {
        "vision_cfg": {**VIT, **POOLER, "output_tokens": True},
        "text_cfg": {**TEXT, "embed_cls": True, "output_tokens": True},
        "multimodal_cfg": {**TEXT, "attn_pooler_heads": 2},
        "custom_text": True,
    },
    # SigLIP: timm's ViT under an attention pool of its own; a text tower that is not causal, pooled at its last token
    "tiny-bidirectional": {
        "embed_dim": 96,  # no projection: that of test_vit3
        "vision_cfg": {"timm_model_name": "test_vit3", "timm_pool": "map", "timm_proj": "none", "image_size": 160},
        "text_cfg": {**TEXT, "no_causal_mask": True, "proj_bias": True, "pool_type": "last"},
        "custom_text": True,
    },
    # LAION's ConvNeXts: depthwise convolutions, and LayerNorms over channels
    "tiny-convnext": {
        "vision_cfg": {"timm_model_name": "test_convnext", "timm_pool": "", "timm_proj": "linear", "image_size": 160},
        "text_cfg": TEXT,
    },
}


@pytest.fixture(scope="module")
def registry(tmp_path_factory: pytest.TempPathFactory) -> None:
    folder = tmp_path_factory.mktemp("configs")
    for name, config in FAMILIES.items():
        (folder / f"{name}.json").write_text(json.dumps({"embed_dim": 64, **config}))
    open_clip.add_model_config(folder)


@pytest.mark.usefixtures("registry")
@pytest.mark.parametrize(
    ("name", "fused"),
    [
        pytest.param("tiny-coca", 2, marks=pytest.mark.slow),
        pytest.param("tiny-bidirectional", 9, marks=pytest.mark.slow),
        pytest.param("tiny-convnext", 0, marks=pytest.mark.slow),
    ],
)
def test_family(tmp_path: Path, name: str, fused: int) -> None:
    keys = ("images=4", "held_out=2", "batch=2", "steps=1")
    rest = ("text.prompts=16", "text.held_out=4", "quantization.rounding=nearest", "evaluation.dataset=fidelity")
    recipe = load_recipe(None, [*(f"synthesis.{key}" for key in keys), *rest])
    report = pipeline.quantize_bundle(name, recipe, output=tmp_path, pretrained="random")
    original = open_bundle(tmp_path / name)
    assert max(original.manifest.parity_max_abs_difference.values()) <= 1e-4
    quantized = open_bundle(report.bundle)
    assert quantized.manifest.quantization.encoders["image_encoder.onnx"].applied(FUSE_ATTENTION.name) == fused
    [folder] = (tmp_path / name).glob("calibration-*")
    made = open_calibration_set(folder)
    loaded = load_model(name, "random")
    ids = TextTokenizer(original.tokenizer)(["a cat", "a photo of the dog"])
    assert np.array_equal(ids, loaded.tokenize(["a cat", "a photo of the dog"])[:, : ids.shape[1]])
    feeds = {"image": np.array(made.held_out), "text": ids}
    for tower, feed in feeds.items():
        float_embeds, embeds = (EncoderSession(bundle.encoders[tower]).run(feed) for bundle in (original, quantized))
        assert (float_embeds * embeds).sum(1).min() > 0.9
        served = {node.op_type for node in optimized_graph(quantized.encoders[tower]).graph}
        assert served & {"Gelu", "FastGelu"}  # FastGelu: by tanh, with its bias
        assert not served & {"BiasGelu", "Erf", "Tanh"}  # timm's GELUs are known for what they are, too
        layers = inspect_encoder(quantized.encoders[tower]).layers
        integer = [0 < (layer.bits or 0) <= 8 for layer in layers]  # attention stays in float
        assert [layer.int8 for layer in layers] == integer


MEMBERS = (
    "RN50-quickgelu",  # OpenAI's
    "ViT-B-32-quickgelu",  # OpenAI's, DFN's and MetaCLIP's
    "ViT-B-32",  # LAION's
    "ViT-L-14-CLIPA",
    "ViT-H-14-worldwide",  # MetaCLIP 2's, XLM-V's tokenizer
    "ViT-L-14-worldwide",  # mT5's tokenizer
    "EVA01-g-14",
    "EVA02-B-16",
    "convnext_tiny",
    "coca_ViT-B-32",
    "coca_roberta-ViT-B-32",
    "ViT-B-16-SigLIP",
    "ViT-B-16-SigLIP2",
    "MobileCLIP-S1",
    "MobileCLIP-B",
    "MobileCLIP2-S0",
    "MobileCLIP2-S3",
    "ViTamin-S",
    "PE-Core-T-16-384",
    "roberta-ViT-B-32",
    "xlm-roberta-base-ViT-B-32",
    "mt5-base-ViT-B-32",
    "nllb-clip-base",
    "nllb-clip-base-siglip",
    "swin_base_patch4_window7_224",
    "vit_medium_patch16_gap_256",
    "vit_relpos_medium_patch16_cls_224",
)
"""One of each family of open_clip's configs. SigLIP 2 NaFlex is refused by name (test_transformers_folders.py)."""


@pytest.fixture(scope="module")
def members(tmp_path_factory: pytest.TempPathFactory) -> None:
    add_miniatures(MEMBERS, tmp_path_factory.mktemp("members"))


@pytest.fixture
def coverage_config(monkeypatch: pytest.MonkeyPatch) -> ModuleType:
    """What benchmarks/coverage.py does with a config, text towers in miniature."""
    pytest.importorskip("transformers")
    monkeypatch.syspath_prepend(str(Path(__file__).resolve().parents[1] / "benchmarks"))
    text_towers = importlib.import_module("text_towers")
    for name, tower in text_towers.TEXT_TOWERS.items():
        small = {key: value for key, value in TEXT_TOWER.items() if key in tower}
        monkeypatch.setitem(text_towers.TEXT_TOWERS, name, tower | small)
    return importlib.import_module("coverage_config")


@pytest.mark.slow
@pytest.mark.usefixtures("members")
@pytest.mark.parametrize("name", MEMBERS)
def test_a_member_of_each_family_is_covered(coverage_config: ModuleType, tmp_path: Path, name: str) -> None:
    """Exported as torch has it, ids and pixels as open_clip's, w8a8 and w4a8 run, 90 % of the products in int8."""
    record = coverage_config.Record(tmp_path / "record.json")
    assert coverage_config.measure(f"tiny-{name}", tmp_path, record) == []
    assert max(record.found["parity"].values()) <= 1e-4
    original = open_bundle(tmp_path / "bundles" / f"tiny-{name}")
    for bits, least in (("w8a8", 0.99), ("w4a8", 0.96)):
        found = record.found[bits]
        assert found["int8"] >= 0.9 * found["products"] > 9
        assert found["cosine"] > 0.85
        means = coverage_config.mean_cosines(original, open_bundle(original.path / bits))
        assert min(means.values()) > least
