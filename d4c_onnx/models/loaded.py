"""A CLIP in memory, and what has to be known about it to export it and to look through it."""

import copy
import hashlib
from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import nn

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import Preprocess, Resampled
from d4c_onnx.models.catalogue import EmbeddedModel
from d4c_onnx.models.plain_attention import replace_attention, replace_hugging_face
from d4c_onnx.models.towers import CausalTextTower, ImageTower, MaskedTextTower, TextTower, text_tower, tower_state
from d4c_onnx.runtime.panics import refusing


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An open_clip model in eval mode and what has to be known about it.

    Attributes:
        name: as the user gave it; of a folder or a config of their own its name.
        pretrained: "embedded", "random", "hub", "folder", a tag or a file's name.
        model: the open_clip module, attention untouched.
        preprocess: from an image to what the image tower takes.
        weights_sha256: over every tensor that the towers read, in name order.
        quick_gelu: whether a layer of it is a QuickGELU.
        embedded: the catalogue's entry for a shipped model.
        sources: who says so, for each setting of `preprocess` and for `quick_gelu`.
        resampled: position embeddings that the weights have for another image size or text length.
    """

    name: str
    pretrained: str
    model: Any
    tokenizer: Any
    preprocess: Preprocess
    weights_sha256: str
    quick_gelu: bool
    embedded: EmbeddedModel | None
    sources: Mapping[str, str] = field(default_factory=dict)
    resampled: tuple[Resampled, ...] = ()

    @property
    def context_length(self) -> int:
        """Where texts are cut: a Hugging Face encoder could take more (514 ids) than its tokenizer gives it."""
        text = getattr(self.model, "text", self.model)
        lengths = [getattr(owner, "context_length", None) for owner in (text, self.tokenizer)]
        return min(int(length) for length in lengths if length)

    def tokenize(self, texts: list[str]) -> np.ndarray:
        """int64 [len(texts), context_length].

        Raises:
            ModelError: the tokenizer opens, and fails on texts, or gives ids that the text tower does not know.
        """
        with refusing(self._fails_on_texts):  # it comes with the model, and raises what it likes
            ids: np.ndarray = self.tokenizer(texts, context_length=self.context_length).numpy().astype(np.int64)
        known = self._known_ids()
        if known is not None and ids.size and not 0 <= ids.min() <= ids.max() < known:
            raise self._fails_on_texts(f"it gives ids from {ids.min()} to {ids.max()}, the text tower knows {known:,}")
        return ids

    def _known_ids(self) -> int | None:
        """Rows of the token table; None where it is not found."""
        text = getattr(self.model, "text", self.model)
        table = getattr(text, "token_embedding", None)
        if table is None and hasattr(getattr(text, "transformer", None), "get_input_embeddings"):
            table = text.transformer.get_input_embeddings()
        return table.num_embeddings if isinstance(table, nn.Embedding) else None

    def _fails_on_texts(self, why: str) -> ModelError:
        return ModelError(
            f"{self.name}: its tokenizer fails on texts ({why}). Put the tokenizer files that belong to the weights "
            "there, or into any folder: --tokenizer FOLDER."
        )

    def normalization(self) -> tuple[torch.Tensor, torch.Tensor]:
        """Mean and standard deviation of the input space, float32 [3, 1, 1] each."""
        mean, std = (torch.tensor(values).view(3, 1, 1) for values in (self.preprocess.mean, self.preprocess.std))
        return mean, std

    @property
    def pad_id(self) -> int | None:
        """What the tokenizer fills texts up with, on their right; None where it does so otherwise, or not at all."""
        inner = getattr(self.tokenizer, "tokenizer", None)
        if inner is None:
            return 0  # open_clip's own
        plain = not getattr(self.tokenizer, "tokenizer_mode", "") and getattr(inner, "padding_side", "") == "right"
        return getattr(inner, "pad_token_id", None) if plain else None

    @property
    def _text_tower(self) -> TextTower:
        return text_tower(self.model, pad_id=self.pad_id)

    @property
    def dynamic_sequence(self) -> bool:
        """Whether the deployed text tower takes prompts of any length up to the context's."""
        return self._text_tower.dynamic_sequence

    @property
    def causal(self) -> bool:
        """Whether the deployed text tower's tokens see those before them only, and its end token is pooled."""
        return self._text_tower.causal

    def cut(self, input_ids: np.ndarray) -> tuple[tuple[int, ...], ...]:
        """Rows without what the text tower does not look at: what follows the end token of a causal one, or padding.

        Args:
            input_ids: int64 [N, context_length]; rows stay whole where the tower has a fixed length.
        """
        tower = self._text_tower
        if isinstance(tower, CausalTextTower):
            end = tower.eos_id if tower.pool_type == "eos" else getattr(self.tokenizer, "eot_token_id", None)
            kept = [np.flatnonzero(row == end)[:1] for row in input_ids]
        elif tower.dynamic_sequence:
            kept = [np.flatnonzero(row != self.pad_id)[-1:] for row in input_ids]
        else:
            kept = [np.zeros(0, np.int64) for _ in input_ids]
        return tuple(
            tuple(row[: last[0] + 1].tolist() if len(last) else row.tolist())
            for row, last in zip(input_ids, kept, strict=True)
        )

    def deployed_towers(self, normalize: bool = True, fixed: bool = False) -> tuple[ImageTower, TextTower]:
        """Both towers in the form that is exported, frozen; the original stays as it is for the parity check.

        Args:
            normalize: divide embeddings by their L2 norm.
            fixed: a text tower that hides padding in the form that is at its full context length all the same.

        What is not re-expressed has parameters of its own over the same memory: moved to another device, or trained in
        another layout, they leave the original alone, and a large model is in memory once.
        """
        shared: dict[int, Any] = {
            id(own): nn.Parameter(own.detach(), requires_grad=False) for own in self.model.parameters()
        }
        model = copy.deepcopy(self.model, shared | {id(own): own for own in self.model.buffers()})
        replace_attention(model)
        model.requires_grad_(False)
        text = text_tower(model, normalize, None if fixed else self.pad_id)
        if isinstance(text, MaskedTextTower):
            replace_hugging_face(text.transformer)
        return ImageTower(model, normalize).eval(), text.eval()


def uses_quick_gelu(model: nn.Module) -> bool:
    """Whether any layer is a QuickGELU, be it open_clip's, timm's or transformers'."""
    return any(type(module).__name__ in ("QuickGELU", "QuickGELUActivation") for module in model.modules())


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of what the towers read."""
    digest = hashlib.sha256()
    for key, value in sorted(tower_state(model).items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).data)
    return digest.hexdigest()
