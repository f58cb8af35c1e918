"""open_clip's own configs in miniature: what makes a family stays, widths, depths and images shrink."""

import copy
import functools
import json
from pathlib import Path
from typing import Any

import open_clip
import timm
from timm.models import register_model
from timm.models.vitamin import VitCfg, VitConvCfg

WIDTH, CONTEXT, VOCABULARY = 32, 12, 300
_VIT = {"img_size": 32, "patch_size": 8, "embed_dim": WIDTH, "depth": 2, "num_heads": 2}
_VITAMIN_STEM = VitCfg(
    embed_dim=(16, 16, WIDTH),
    depths=(1, 1, 1),
    stem_width=16,
    conv_cfg=VitConvCfg(norm_layer="layernorm2d", norm_eps=1e-6),
    head_type="1d",
)
# timm's model -> side of its images in miniature, and what its function is called with
_TIMM: dict[str, tuple[int, dict[str, Any]]] = {
    "eva_giant_patch14_224": (32, _VIT),
    "eva02_base_patch16_clip_224": (32, {**_VIT, "ref_feat_shape": (4, 4)}),
    "vit_pe_core_tiny_patch16_384": (32, {**_VIT, "ref_feat_shape": (4, 4), "attn_pool_num_heads": 2}),
    "vit_base_patch16_siglip_224": (32, _VIT),
    "vit_base_patch16_siglip_384": (32, _VIT),
    "vit_medium_patch16_gap_256": (32, _VIT),
    "vit_relpos_medium_patch16_cls_224": (32, {**_VIT, "rel_pos_dim": 16}),
    "vit_base_mci_224": (32, {"img_size": 32, "depth": 1}),  # the width is that of its stem
    "fastvit_mci0": (64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 64)}),
    "fastvit_mci1": (64, {"layers": (1, 1, 1, 1), "embed_dims": (16, 16, 32, 64)}),
    "fastvit_mci3": (128, {"layers": (1, 1, 1, 1, 1), "embed_dims": (16, 16, 32, 32, 64)}),
    "vitamin_small_224": (
        32,
        {"img_size": 32, "embed_dim": WIDTH, "depth": 2, "num_heads": 2, "embed_cfg": _VITAMIN_STEM},
    ),
    "swin_base_patch4_window7_224": (
        32,
        {"img_size": 32, "window_size": 4, "embed_dim": 16, "depths": (2, 2), "num_heads": (1, 2)},
    ),
    "convnext_tiny": (64, {"depths": (1, 1, 1, 1), "dims": (16, 16, WIDTH, WIDTH)}),
}
TEXT_TOWER = {
    **{"vocab_size": VOCABULARY, "max_position_embeddings": 128},
    # of BERTs; of mT5; of NLLB
    **{"hidden_size": WIDTH, "intermediate_size": 64, "num_attention_heads": 2, "num_hidden_layers": 2},
    **{"d_model": WIDTH, "d_ff": 64, "d_kv": 16, "num_heads": 2, "num_layers": 2},
    **{"encoder_layers": 2, "encoder_ffn_dim": 64, "encoder_attention_heads": 2},
    **{"decoder_layers": 1, "decoder_ffn_dim": 64, "decoder_attention_heads": 2},
}
"""What shrinks in a `config.json` of transformers."""


def miniature(name: str) -> dict[str, Any]:
    """The config of that name, small enough for a test."""
    config = copy.deepcopy(open_clip.get_model_config(name))
    config["vision_cfg"] |= _vision(config["vision_cfg"])
    config["embed_dim"] = WIDTH
    config["text_cfg"] = small_text(config["text_cfg"], CONTEXT)
    if "multimodal_cfg" in config:
        config["multimodal_cfg"] = small_text(config["multimodal_cfg"], CONTEXT)
    return config


def small_text(text: dict[str, Any], context: int) -> dict[str, Any]:
    """A text tower's config with few and narrow layers; a tower that is described on the hub shrinks there."""
    small = text | {"width": WIDTH, "heads": 2, "layers": 2}
    if "attn_pooler_heads" in text:
        small["attn_pooler_heads"] = 2
    if "hf_tokenizer_name" in text:
        small["vocab_size"] = VOCABULARY
    return small if "hf_model_name" in text else small | {"context_length": context}


def add_miniatures(names: tuple[str, ...], folder: Path) -> None:
    """Make `tiny-NAME` known to open_clip, and their towers to timm.

    Args:
        folder: for the configs.
    """
    for name in names:
        config = miniature(name)
        tower = config["vision_cfg"].get("timm_model_name", "")
        if tower.startswith("tiny_") and not timm.is_model(tower):
            _register(tower)
        (folder / f"tiny-{name}.json").write_text(json.dumps(config))
    open_clip.add_model_config(folder)


def _vision(vision: dict[str, Any]) -> dict[str, Any]:
    if "timm_model_name" in vision:
        side, _ = _TIMM[vision["timm_model_name"]]
        return {"timm_model_name": f"tiny_{vision['timm_model_name']}", "image_size": side}
    if isinstance(vision["layers"], list):
        return {"layers": [1, 1, 1, 1], "width": 8, "image_size": 64}
    small = {"layers": 2, "width": WIDTH, "head_width": 16, "patch_size": 8, "image_size": 32}
    return small | ({"attn_pooler_heads": 2, "attn_pooler_queries": 4} if "attn_pooler_heads" in vision else {})


def _register(tower: str) -> None:
    """A function of timm's, with other arguments, under another name."""
    name = tower.removeprefix("tiny_")
    make, (_, smaller) = timm.model_entrypoint(name), _TIMM[name]

    @functools.wraps(make)
    def tiny(pretrained: bool = False, **options: Any) -> Any:
        return make(pretrained=pretrained, **{**smaller, **options})

    tiny.__name__, tiny.__module__ = tower, __name__
    register_model(tiny)
