"""Loading a CLIP: embedded mini, open_clip name and tag, hf-hub:, local checkpoint, or explicit random weights."""

import contextlib
import copy
import difflib
import hashlib
import logging
import socket
import urllib.parse
import urllib.request
import warnings
from collections.abc import Iterator
from dataclasses import asdict, dataclass
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from huggingface_hub import constants as hub
from open_clip.factory import load_checkpoint
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from open_clip.transform import PreprocessCfg
from safetensors import SafetensorError
from safetensors.torch import load as load_safetensors
from torch import nn

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.models.catalogue import EmbeddedModel, embedded_models
from d4c_onnx.models.compact import unpack_token_table
from d4c_onnx.models.plain_attention import replace_attention, replace_hugging_face
from d4c_onnx.models.towers import CausalTextTower, ImageTower, MaskedTextTower, TextTower, text_tower, tower_state

_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
_HUB = "hf-hub:"
WAYS_OUT = (
    "Three ways out: run once where the hub can be reached (the weights are then cached); pass a local checkpoint "
    "with --pretrained FILE.safetensors; or, for speed and size work only, --pretrained random."
)


@dataclass(frozen=True, slots=True)
class LoadedModel:
    """An open_clip model in eval mode and what has to be known about it.

    Attributes:
        name, pretrained: as the user gave them; `pretrained` is "embedded", "random", a tag or a file's name.
        model: the open_clip module, attention untouched.
        preprocess: from an image to what the image tower takes.
        weights_sha256: over every tensor that the towers read, in name order.
        embedded: the catalogue's entry for a shipped model.
    """

    name: str
    pretrained: str
    model: Any
    tokenizer: Any
    preprocess: Preprocess
    weights_sha256: str
    quick_gelu: bool
    embedded: EmbeddedModel | None

    @property
    def context_length(self) -> int:
        """Where texts are cut: a Hugging Face encoder could take more (514 ids) than its tokenizer gives it."""
        text = getattr(self.model, "text", self.model)
        lengths = [getattr(owner, "context_length", None) for owner in (text, self.tokenizer)]
        return min(int(length) for length in lengths if length)

    def tokenize(self, texts: list[str]) -> np.ndarray:
        """int64 [len(texts), context_length]."""
        return self.tokenizer(texts, context_length=self.context_length).numpy().astype(np.int64)

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


def load_model(name: str, pretrained: str | None = None, seed: int = 0) -> LoadedModel:
    """Load a model on the CPU in float32.

    Args:
        name: an embedded model, an open_clip architecture, or `hf-hub:org/repo`.
        pretrained: None for embedded and hf-hub models; else a tag, a checkpoint's path, or `random`.
        seed: for `random` weights.

    Raises:
        ModelError: nothing of that name, the weights cannot be reached or read, or do not fit the architecture.
    """
    shipped = embedded_models()
    if name in shipped:
        if pretrained not in (None, "embedded", "random"):
            raise ModelError(f"--pretrained {pretrained}: {name} ships with its weights. Leave --pretrained away.")
        return _load_embedded(shipped[name], pretrained or "embedded", seed)
    on_hub = name.startswith(_HUB)
    if not on_hub and name not in open_clip.list_models():
        near = difflib.get_close_matches(name, [*shipped, *open_clip.list_models()], 3, 0.5)
        hint = f" Did you mean {', '.join(near)}?" if near else ""
        raise ModelError(f"{name}: no such model.{hint} d4c-onnx models lists all; hf-hub:org/repo also works.")
    if on_hub and pretrained is not None:
        raise ModelError(f"--pretrained {pretrained}: {name} names its own weights. Leave --pretrained away.")
    if not on_hub and pretrained is None:
        tags = ", ".join(open_clip.list_pretrained_tags_by_model(name)) or "none"
        raise ModelError(f"{name}: which weights? Add --pretrained TAG ({tags}), --pretrained FILE, or random.")
    with _hub_access():
        return _load_registry(name, pretrained, seed)


def _load_embedded(entry: EmbeddedModel, pretrained: str, seed: int) -> LoadedModel:
    torch.manual_seed(seed)
    model = CLIP(**copy.deepcopy(entry.model_cfg))
    if pretrained == "embedded":
        blob = (resources.files("d4c_onnx.models.embedded") / f"{entry.name}.safetensors").read_bytes()
        state = unpack_token_table(load_safetensors(blob))
        model.load_state_dict({key: value.float() for key, value in state.items()})
    size = entry.model_cfg["vision_cfg"]["image_size"]
    preprocess = _preprocess(asdict(PreprocessCfg(size=size)))
    tokenizer = SimpleTokenizer(context_length=entry.model_cfg["text_cfg"]["context_length"])
    return _loaded(entry.name, pretrained, model, tokenizer, preprocess, entry.model_cfg["quick_gelu"], entry)


def _load_registry(name: str, pretrained: str | None, seed: int) -> LoadedModel:
    tags = open_clip.list_pretrained_tags_by_model(name) if not name.startswith(_HUB) else []
    tag = pretrained if pretrained in tags else None
    if pretrained not in (None, "random") and tag is None:
        _check_checkpoint(name, Path(str(pretrained)), tags)
    # A tag trained with QuickGELU under an architecture that defaults to GELU gives wrong embeddings, silently.
    quick = bool(tag and (open_clip.get_pretrained_cfg(name, tag) or {}).get("quick_gelu"))
    torch.manual_seed(seed)
    try:
        needs_weights = tag is not None or name.startswith(_HUB)
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            model = open_clip.create_model(
                name,
                pretrained=tag,
                load_weights=needs_weights,
                force_quick_gelu=quick,
                pretrained_text=False,
                require_pretrained=needs_weights,
            )
            tokenizer = open_clip.get_tokenizer(name)
    except Exception as error:  # the hub client raises a dozen types, none of them public
        if isinstance(error, ModuleNotFoundError) or "pip install transformers" in str(error):
            package = getattr(error, "name", None) or "transformers"
            raise ModelError(
                f"{name}: needs the Python package {package}. Install it with pip install 'd4c-onnx[hf]'."
            ) from error
        raise ModelError(f"{name} {pretrained or ''}: cannot be loaded ({_short(error)}). {WAYS_OUT}") from error
    if pretrained is not None and tag is None and pretrained != "random":
        _load_file(model, name, Path(pretrained))
    config = open_clip.get_model_config(name) if not name.startswith(_HUB) else {}
    quick = quick or bool((config or {}).get("quick_gelu"))
    shown = Path(pretrained).name if pretrained and tag is None else (pretrained or "hub")
    return _loaded(name, shown, model, tokenizer, _preprocess(dict(model.visual.preprocess_cfg)), quick, None)


def _check_checkpoint(name: str, path: Path, tags: list[str]) -> None:
    if path.suffix not in _CHECKPOINTS:
        known = ", ".join(tags) or "none"
        raise ModelError(
            f"--pretrained {path}: neither a tag of {name} ({known}) nor a checkpoint ({', '.join(_CHECKPOINTS)})."
        )
    if not path.is_file():
        raise ModelError(f"--pretrained {path}: no such file.")


def _load_file(model: Any, name: str, path: Path) -> None:
    try:
        load_checkpoint(model, str(path), strict=True, weights_only=True)
    except (SafetensorError, OSError, EOFError) as error:
        raise ModelError(f"{path}: cannot be read as a checkpoint ({_short(error)}). Is the file complete?") from error
    except RuntimeError as error:
        text = str(error)
        if "Missing key" in text or "size mismatch" in text or "Unexpected key" in text:
            lines = [line.strip() for line in text.splitlines()[1:] if line.strip()]
            raise ModelError(
                f"{path}: the weights do not fit {name} ({_short(lines[0] if lines else text)}). "
                "Name the architecture they belong to."
            ) from error
        raise ModelError(f"{path}: cannot be read as a checkpoint ({_short(error)}).") from error
    except Exception as error:  # torch's unpickler raises what the file makes it raise
        raise ModelError(
            f"{path}: cannot be read with weights_only ({_short(error)}). Save it as .safetensors and try again."
        ) from error


def _loaded(
    name: str,
    pretrained: str,
    model: nn.Module,
    tokenizer: Any,
    preprocess: Preprocess,
    quick: bool,
    entry: EmbeddedModel | None,
) -> LoadedModel:
    model.eval().float().requires_grad_(False)
    return LoadedModel(name, pretrained, model, tokenizer, preprocess, hash_weights(model), quick, entry)


def hash_weights(model: nn.Module) -> str:
    """SHA-256 over names, shapes and values of what the towers read."""
    digest = hashlib.sha256()
    for key, value in sorted(tower_state(model).items()):
        digest.update(f"{key} {tuple(value.shape)}".encode())
        digest.update(np.ascontiguousarray(value.detach().cpu().numpy()).data)
    return digest.hexdigest()


def _preprocess(cfg: dict[str, Any]) -> Preprocess:
    size = cfg["size"]
    height, width = (size, size) if isinstance(size, int) else (int(size[0]), int(size[-1]))
    return Preprocess(
        size=(height, width),
        mean=tuple(float(value) for value in cfg["mean"]),
        std=tuple(float(value) for value in cfg["std"]),
        interpolation=cfg["interpolation"],
        resize_mode=cfg["resize_mode"],
        fill_color=int(cfg.get("fill_color") or 0),
    )


def _short(error: object) -> str:
    text = " ".join(str(error).split())
    return text if len(text) <= 200 else text[:197] + "..."


@contextlib.contextmanager
def _hub_access() -> Iterator[None]:
    """Quiet, and quick to say no.

    open_clip and the hub client log every step and retry; errors reach the user through exceptions instead. Where the
    hub's name cannot be resolved (and no proxy is set), only the local cache is asked: the client itself would retry
    for a minute.
    """
    proxied = bool(urllib.request.getproxies())
    offline = hub.HF_HUB_OFFLINE
    logging.disable(logging.CRITICAL)
    try:
        if not offline and not proxied:
            try:
                socket.getaddrinfo(urllib.parse.urlparse(hub.ENDPOINT).hostname, 443)
            except OSError:
                hub.HF_HUB_OFFLINE = True
        yield
    finally:
        hub.HF_HUB_OFFLINE = offline
        logging.disable(logging.NOTSET)
