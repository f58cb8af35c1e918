"""Tensors of transformers' CLIP, SigLIP and Chinese CLIP under open_clip's names.

Names are mapped by pattern; the three projections of an attention become the one that open_clip has.
"""

import re
from collections.abc import Mapping

import torch

_Rules = tuple[tuple[str, str], ...]

_BLOCK: _Rules = (
    (r"encoder\.layers\.(\d+)\.", r"transformer.resblocks.\1."),
    (r"self_attn\.in_proj_", "attn.in_proj_"),
    (r"self_attn\.out_proj", "attn.out_proj"),
    (r"layer_norm([12])\.", r"ln_\1."),
    (r"mlp\.fc1", "mlp.c_fc"),
    (r"mlp\.fc2", "mlp.c_proj"),
)
_VIT: _Rules = (
    (r"^vision_model\.", "visual."),
    (r"embeddings\.class_embedding", "class_embedding"),
    (r"embeddings\.patch_embedding", "conv1"),
    (r"visual\.embeddings\.position_embedding\.weight", "visual.positional_embedding"),
    (r"pre_layrnorm", "ln_pre"),
    (r"post_layernorm", "ln_post"),
    (r"^visual_projection\.weight", "visual.proj"),
)
_TEXT: _Rules = (
    (r"^text_model\.embeddings\.token_embedding", "token_embedding"),
    (r"^text_model\.embeddings\.position_embedding\.weight", "positional_embedding"),
    (r"^text_model\.final_layer_norm", "ln_final"),
    (r"^text_model\.", ""),
)
_TIMM: _Rules = (
    (r"^vision_model\.", "visual.trunk."),
    (r"embeddings\.patch_embedding", "patch_embed.proj"),
    (r"embeddings\.position_embedding\.weight", "pos_embed"),
    (r"encoder\.layers\.(\d+)\.", r"blocks.\1."),
    (r"self_attn\.in_proj_", "attn.qkv."),
    (r"self_attn\.out_proj", "attn.proj"),
    (r"layer_norm([12])\.", r"norm\1."),
    (r"post_layernorm", "norm"),
    (r"head\.probe", "attn_pool.latent"),
    (r"head\.attention\.out_proj", "attn_pool.proj"),
    (r"head\.layernorm", "attn_pool.norm"),
    (r"head\.mlp", "attn_pool.mlp"),
)
_PARTS = ("q_proj", "k_proj", "v_proj")
_UNUSED = "position_ids"  # a buffer of older releases


def _renamed(state: Mapping[str, torch.Tensor], rules: _Rules) -> dict[str, torch.Tensor]:
    renamed = {}
    for name, value in state.items():
        for pattern, other in rules:
            name = re.sub(pattern, other, name)
        renamed[name] = value
    return renamed


def _joined(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Queries, keys and values as one projection, [3 x width, width]."""
    joined = {}
    for name, value in state.items():
        if name.endswith(_UNUSED):
            continue
        found = re.match(r"(.*\.self_attn\.)([qkv]_proj)\.(weight|bias)$", name)
        if found is None:
            joined[name] = value
        elif found[2] == _PARTS[0]:
            parts = [state.get(f"{found[1]}{part}.{found[3]}") for part in _PARTS]
            if all(part is not None for part in parts):  # what is missing is told as such
                joined[f"{found[1]}in_proj_{found[3]}"] = torch.cat([part for part in parts if part is not None])
    return joined


def _turned(state: dict[str, torch.Tensor], *names: str) -> dict[str, torch.Tensor]:
    """Projections as open_clip multiplies by them: [in, out]."""
    return {name: value.T.contiguous() if name in names else value for name, value in state.items()}


def _split(state: Mapping[str, torch.Tensor]) -> tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]:
    """The image tower's tensors, and the others."""
    image = {name: value for name, value in state.items() if name.startswith(("vision_model.", "visual_projection."))}
    return image, {name: value for name, value in state.items() if name not in image}


def renamed_clip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A CLIPModel's."""
    image, texts = _split(_joined(state))
    texts = _renamed(texts, (*_TEXT, *_BLOCK, (r"^text_projection\.weight", "text_projection")))
    return _turned({**_renamed(image, (*_VIT, *_BLOCK)), **texts}, "visual.proj", "text_projection")


def renamed_chinese(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A ChineseCLIPModel's, whose text tower is a BERT."""
    image, texts = _split(_joined(state))
    # transformers' own towers have no pooler; some folders store one all the same
    texts = {name: value for name, value in texts.items() if not name.startswith("text_model.pooler.")}
    rules = ((r"^text_model\.", "text.transformer."), (r"^text_projection\.", "text.proj."))
    return {**_turned(_renamed(image, (*_VIT, *_BLOCK)), "visual.proj"), **_renamed(texts, rules)}


def renamed_siglip(state: Mapping[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """A SiglipModel's."""
    image, texts = _split(_joined(state))
    pooled: dict[str, torch.Tensor] = {}
    for kind in ("weight", "bias"):
        whole = image.pop(f"vision_model.head.attention.in_proj_{kind}", None)
        if whole is not None:
            third = len(whole) // 3
            pooled |= {
                f"visual.trunk.attn_pool.{n}.{kind}": v for n, v in (("q", whole[:third]), ("kv", whole[third:]))
            }
    image = _renamed(image, _TIMM)
    positions = "visual.trunk.pos_embed"
    if positions in image:
        image[positions] = image[positions][None]
    head = (r"^text_model\.head\.", "text_projection.")
    texts = _renamed(texts, (head, *_TEXT, *_BLOCK))
    scalars = ("logit_scale", "logit_bias")
    return {**image, **pooled, **{name if name in scalars else f"text.{name}": v for name, v in texts.items()}}
