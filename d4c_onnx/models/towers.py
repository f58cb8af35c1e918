"""The two towers as they are exported: pooling before the last LayerNorm, embeddings normalised."""

from typing import Any

import torch
import torch.nn.functional as F
from torch import nn

_CAPTIONER = "text_decoder."  # CoCa's, behind both towers


def tower_state(model: nn.Module) -> dict[str, torch.Tensor]:
    """An open_clip model's state dict without what neither tower reads.

    open_clip leaves parts of the captioner as the memory was: they may hold anything, and differ from load to load.
    """
    return {name: value for name, value in model.state_dict().items() if not name.startswith(_CAPTIONER)}


class ImageTower(nn.Module):
    """pixel_values float32 [batch, 3, H, W] -> image_embeds float32 [batch, D]."""

    def __init__(self, model: Any, normalize: bool = True) -> None:
        super().__init__()
        self.visual = model.visual
        self.normalize = normalize

    def forward(self, pixel_values: torch.Tensor) -> torch.Tensor:
        embeds = self.visual(pixel_values)
        embeds = embeds[0] if isinstance(embeds, tuple) else embeds
        return F.normalize(embeds, dim=-1) if self.normalize else embeds


class CausalTextTower(nn.Module):
    """A causal tower that pools at the end token; input_ids int64 [batch, sequence] -> text_embeds float32 [batch, D].

    Causal masking makes every token after the end token irrelevant, so any sequence length up to the context length
    gives the same embedding. Pooling comes before the final LayerNorm, which works token by token: exact, and cheaper.
    """

    dynamic_sequence = causal = True

    def __init__(self, text: Any, pool_type: str, eos_id: int | None, normalize: bool = True) -> None:
        super().__init__()
        self.token_embedding, self.transformer = text.token_embedding, text.transformer
        self.ln_final, self.text_projection = text.ln_final, text.text_projection
        self.positional_embedding = text.positional_embedding
        self.pool_type, self.eos_id, self.normalize = pool_type, eos_id, normalize
        # Finite and in float16's range; exp(-10000) is exactly 0 in float32, so the result equals that of -inf.
        self.causal_mask: torch.Tensor
        mask = torch.full((text.context_length, text.context_length), -10000.0).triu(1)
        self.register_buffer("causal_mask", mask, persistent=False)

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        length = input_ids.shape[1]
        x = self.token_embedding(input_ids) + self.positional_embedding[:length]
        x = self.transformer(x, attn_mask=self.causal_mask[:length, :length])
        # The end token is the highest id. CUDA's provider has no integer ArgMax, and among ids in bfloat16 (OpenVINO's
        # choice where the processor multiplies it) or float16 the start token would be as high.
        end = input_ids.amax(1, keepdim=True) if self.pool_type == "argmax" else self.eos_id or 0
        index = torch.eq(input_ids, end).float().argmax(1)[:, None, None].expand(-1, 1, x.shape[2])  # [batch, 1, width]
        x = self.ln_final(x.gather(1, index).squeeze(1))
        if isinstance(self.text_projection, nn.Linear):
            x = self.text_projection(x)
        elif self.text_projection is not None:
            x = x @ self.text_projection
        return F.normalize(x, dim=-1) if self.normalize else x


class MaskedTextTower(nn.Module):
    """A Hugging Face encoder that hides padding; input_ids int64 [batch, sequence] -> text_embeds float32 [batch, D].

    No token attends to padding, and the pooler leaves it out: any sequence length that holds the whole text gives the
    same embedding. The mask is added to the scores, [batch, 1, sequence, sequence]: a mask of booleans would come out
    with a guard behind each softmax for rows that see nothing, and there are none.
    """

    dynamic_sequence, causal = True, False

    def __init__(self, text: Any, normalize: bool = True) -> None:
        super().__init__()
        self.transformer, self.pooler, self.proj = text.transformer, text.pooler, text.proj
        self.pad_id, self.normalize = int(text.config.pad_token_id), normalize

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        # finite and in float16's range, as in the causal mask
        hidden = torch.eq(input_ids, self.pad_id).float() * -10000.0
        hidden = hidden[:, None, :].expand(-1, input_ids.shape[1], -1).unsqueeze(1)
        out = self.transformer(input_ids=input_ids, attention_mask=hidden)
        embeds: torch.Tensor = self.proj(self.pooler(out, torch.ne(input_ids, self.pad_id).long()))
        return F.normalize(embeds, dim=-1) if self.normalize else embeds


class FixedTextTower(nn.Module):
    """Any other text tower (SigLIP's looks at its padding) at its fixed context length."""

    dynamic_sequence = causal = False

    def __init__(self, model: Any, normalize: bool = True) -> None:
        super().__init__()
        self.model, self.normalize = model, normalize

    def forward(self, input_ids: torch.Tensor) -> torch.Tensor:
        embeds: torch.Tensor = self.model.encode_text(input_ids)
        return F.normalize(embeds, dim=-1) if self.normalize else embeds


TextTower = CausalTextTower | MaskedTextTower | FixedTextTower

_MASKED_POOLERS = ("MeanPooler", "ClsPooler", "ClsLastHiddenStatePooler")  # open_clip's maximum is one over padding


def text_tower(model: Any, normalize: bool = True, pad_id: int | None = None) -> TextTower:
    """The deployable text tower of an open_clip model: dynamic in its sequence where that is exact.

    Args:
        pad_id: what the tokenizer fills texts up with, on their right; a tower that hides another id is fixed.
    """
    text = getattr(model, "text", model)
    pool_type = getattr(text, "pool_type", None) or getattr(text, "text_pool_type", None)
    eos_id = getattr(text, "eos_id", None) if text is not model else getattr(model, "text_eos_id", None)
    causal = getattr(text, "attn_mask", None) is not None and hasattr(text, "token_embedding")
    plain = getattr(text, "cls_emb", None) is None and not getattr(text, "use_pad_mask", False)
    if causal and plain and pool_type in ("argmax", "eos"):
        return CausalTextTower(text, pool_type, eos_id, normalize)
    config, pooler = getattr(text, "config", None), getattr(text, "pooler", None)
    masked = type(text).__name__ == "HFTextEncoder" and type(pooler).__name__ in _MASKED_POOLERS
    if masked and pad_id is not None and getattr(config, "pad_token_id", None) == pad_id:
        return MaskedTextTower(text, normalize)
    return FixedTextTower(model, normalize)
