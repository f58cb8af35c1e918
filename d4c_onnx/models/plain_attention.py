"""Attention re-expressed for deployment: one plain Linear per projection, the 1/sqrt(d) folded into q.

`nn.MultiheadAttention` exports to a graph of slices and reshapes around one fused weight. Written as four Linears,
the same numbers come out of one quantisable MatMul per projection. Two of their biases need no pass over the tokens:
k's adds the same q b_k to every score of a row, which a softmax does not see, and v's comes through the mixture as it
is, since the weights of a row sum to 1, and joins the output projection's. Exact up to float32 rounding.
"""

from typing import Any

import torch
from torch import nn


class PlainAttention(nn.Module):
    """Self-attention with separate projections; call-compatible with `nn.MultiheadAttention` as open_clip calls it."""

    def __init__(self, q: nn.Linear, k: nn.Linear, v: nn.Linear, out: nn.Linear, heads: int) -> None:
        super().__init__()
        self.q_proj, self.k_proj, self.v_proj, self.out_proj = q, k, v, out
        self.heads = heads

    def forward(
        self,
        query: torch.Tensor,
        key: torch.Tensor | None = None,
        value: torch.Tensor | None = None,
        need_weights: bool = False,
        attn_mask: torch.Tensor | None = None,
        **_: Any,
    ) -> tuple[torch.Tensor, None]:
        """All float32 [batch, length, width]. Returns ([batch, length, width], None).

        Args:
            query, key, value: what attends, and what is attended to; by default the query.
            need_weights: ignored; no weights are returned.
            attn_mask: additive, [query, key], or [batch * heads, query, key] where each text has its own (CoCa).
        """
        key = query if key is None else key
        value = key if value is None else value
        q, k, v = self._split(self.q_proj(query)), self._split(self.k_proj(key)), self._split(self.v_proj(value))
        scores = q @ k.transpose(-1, -2)  # [batch, heads, query, key]
        if attn_mask is not None:
            scores = scores + (attn_mask.unflatten(0, (-1, self.heads)) if attn_mask.ndim == 3 else attn_mask)
        mixed = (scores.softmax(-1) @ v).transpose(1, 2)  # [batch, query, heads, width / heads]
        return self.out_proj(mixed.flatten(2)), None

    def _split(self, x: torch.Tensor) -> torch.Tensor:
        return x.unflatten(-1, (self.heads, -1)).transpose(1, 2)  # [batch, heads, length, width / heads]


class PlainTimmAttention(nn.Module):
    """Self-attention with separate projections; call-compatible with timm's `Attention` (SigLIP, MobileCLIP-B)."""

    def __init__(self, attention: PlainAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(self, x: torch.Tensor, attn_mask: torch.Tensor | None = None, is_causal: bool = False) -> torch.Tensor:
        """x: float32 [batch, length, width]; the mask is additive. Returns [batch, length, width]."""
        assert not is_causal
        return self.attention(x, attn_mask=attn_mask)[0]


class PlainHuggingFaceAttention(nn.Module):
    """Self-attention with separate projections, that of the output included; call-compatible with BERT's."""

    def __init__(self, attention: PlainAttention) -> None:
        super().__init__()
        self.attention = attention

    def forward(
        self, hidden_states: torch.Tensor, attention_mask: torch.Tensor | None = None, *_: Any, **__: Any
    ) -> tuple[torch.Tensor, None]:
        """hidden_states: float32 [batch, length, width]; the mask is added, [batch, 1, length, length]."""
        return self.attention(hidden_states, attn_mask=attention_mask)


class PlainAttentionPool(nn.Module):
    """CLIP's ResNet attention pool with one query, the mean token: the only row that the original returns."""

    def __init__(self, attention: PlainAttention, positional_embedding: torch.Tensor) -> None:
        super().__init__()
        self.attention = attention
        self.positional_embedding = nn.Parameter(positional_embedding.detach().clone(), requires_grad=False)

    def forward(self, x: torch.Tensor) -> torch.Tensor:
        """x: float32 [batch, channels, height, width]. Returns [batch, embed]."""
        # The mean is taken of the map: OpenVINO 2026.4 takes a wrong one of quantised tokens behind a Transpose.
        mean = x.mean((2, 3))[:, None]
        tokens = x.flatten(2).transpose(1, 2)  # [batch, height * width, channels]
        tokens = torch.cat([mean, tokens], 1) + self.positional_embedding
        return self.attention(tokens[:, :1], tokens)[0].squeeze(1)


def linear(weight: torch.Tensor, bias: torch.Tensor | None) -> nn.Linear:
    """A Linear with copies of `weight` [out, in] and `bias` [out]."""
    layer = nn.Linear(weight.shape[1], weight.shape[0], bias=bias is not None)
    layer.weight.data.copy_(weight.detach())
    if bias is not None:
        layer.bias.data.copy_(bias.detach())
    return layer


def plain_attention(module: nn.MultiheadAttention) -> PlainAttention | None:
    """Re-express an `nn.MultiheadAttention`; None where it uses something that has no plain form here."""
    same_width = module._qkv_same_embed_dim and module.in_proj_weight is not None
    if not same_width or not module.batch_first or module.bias_k is not None or module.add_zero_attn:
        return None
    q, k, v = module.in_proj_weight.chunk(3)
    biases = module.in_proj_bias.chunk(3) if module.in_proj_bias is not None else (None, None, None)
    return from_projections((q, k, v), biases, module.out_proj, module.num_heads)


def plain_attention_pool(module: nn.Module) -> PlainAttentionPool:
    """Re-express open_clip's `AttentionPool2d`."""
    pool: Any = module
    weights = (pool.q_proj.weight, pool.k_proj.weight, pool.v_proj.weight)
    biases = (pool.q_proj.bias, pool.k_proj.bias, pool.v_proj.bias)
    attention = from_projections(weights, biases, pool.c_proj, pool.num_heads)
    return PlainAttentionPool(attention, pool.positional_embedding)


def plain_timm_attention(module: nn.Module) -> PlainTimmAttention | None:
    """Re-express timm's `Attention`; None where it normalises or gates something (no plain form here)."""
    timm: Any = module
    parts = [getattr(timm, name, None) for name in ("q_norm", "k_norm", "norm", "gate")]
    if any(part is not None and not isinstance(part, nn.Identity) for part in parts):
        return None
    biases = timm.qkv.bias.chunk(3) if timm.qkv.bias is not None else (None, None, None)
    return PlainTimmAttention(from_projections(timm.qkv.weight.chunk(3), biases, timm.proj, timm.num_heads))


def from_projections(weights: Any, biases: Any, out: nn.Linear, heads: int) -> PlainAttention:
    """Build a `PlainAttention`; q's weight and bias carry the 1/sqrt(width / heads), the output's bias that of v."""
    scale = (weights[0].shape[0] // heads) ** -0.5
    q = linear(weights[0] * scale, None if biases[0] is None else biases[0] * scale)
    k, v = linear(weights[1], None), linear(weights[2], None)
    moved = out.bias
    if biases[2] is not None:
        through = out.weight.detach().double() @ biases[2].detach().double()
        moved = (through if moved is None else through + moved.detach()).to(out.weight.dtype)
    return PlainAttention(q, k, v, linear(out.weight, moved), heads)


def replace_attention(root: nn.Module) -> int:
    """Swap every attention below `root` that has a plain form, in place; returns how many."""
    replaced = 0
    for parent in list(root.modules()):
        for name, child in list(parent.named_children()):
            plain: nn.Module | None = None
            if type(child) is nn.MultiheadAttention:
                plain = plain_attention(child)
            elif type(child).__name__ == "AttentionPool2d" and hasattr(child, "c_proj"):
                plain = plain_attention_pool(child)
            elif type(child).__name__ == "Attention" and type(child).__module__.startswith("timm.layers"):
                plain = plain_timm_attention(child)
            if plain is not None:
                setattr(parent, name, plain.train(child.training))
                replaced += 1
    return replaced


def replace_hugging_face(encoder: nn.Module) -> int:
    """Swap every attention of a Hugging Face encoder that has a plain form, in place; returns how many.

    Attention of another form than BERT's (T5's is relative) becomes products without a fused kernel, and stays its own.
    """
    root: Any = encoder
    if hasattr(root, "set_attn_implementation"):  # transformers before 4.50
        root.set_attn_implementation("eager")
    replaced = 0
    for parent in list(encoder.modules()):
        attention, output = getattr(parent, "self", None), getattr(parent, "output", None)
        plain = plain_hugging_face(attention, output)
        if plain is not None and output is not None:
            parent.add_module("self", plain.train(parent.training))
            output.add_module("dense", nn.Identity())
            replaced += 1
    return replaced


def plain_hugging_face(attention: Any, output: Any) -> PlainHuggingFaceAttention | None:
    """Re-express BERT's, RoBERTa's or XLM-RoBERTa's attention with the output projection; None for any other."""
    names = ("query", "key", "value")
    projections: list[Any] = [getattr(attention, name, None) for name in names] + [getattr(output, "dense", None)]
    known = type(attention).__name__.endswith("SelfAttention") and hasattr(attention, "num_attention_heads")
    relative = getattr(attention, "position_embedding_type", None) not in (None, "absolute")
    if not known or relative or not all(isinstance(entry, nn.Linear) for entry in projections):
        return None
    weights, biases = zip(*((entry.weight, entry.bias) for entry in projections[:3]), strict=True)
    return PlainHuggingFaceAttention(from_projections(weights, biases, output.dense, attention.num_attention_heads))
