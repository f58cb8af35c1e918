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
from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass, field, replace
from importlib import resources
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import torch
from huggingface_hub import constants as hub
from open_clip.model import CLIP
from open_clip.tokenizer import SimpleTokenizer
from safetensors.torch import load as load_safetensors
from torch import nn

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import Preprocess, Resampled
from d4c_onnx.models.beside import configs_beside
from d4c_onnx.models.catalogue import EmbeddedModel, embedded_models
from d4c_onnx.models.checkpoint import fit_checkpoint, load_published, read_checkpoint, set_image_size, short
from d4c_onnx.models.compact import unpack_token_table
from d4c_onnx.models.model_options import ModelOptions
from d4c_onnx.models.plain_attention import replace_attention, replace_hugging_face
from d4c_onnx.models.preprocessing import (
    BESIDE,
    Settings,
    default_settings,
    settings_of_file,
    settings_of_hub,
    settings_of_random,
    settings_of_tag,
    square_or_sides,
)
from d4c_onnx.models.towers import CausalTextTower, ImageTower, MaskedTextTower, TextTower, text_tower, tower_state

_CHECKPOINTS = (".safetensors", ".pt", ".pth", ".bin")
_HUB = "hf-hub:"

ImageSize = tuple[int, int] | None
Fill = Callable[[Any, ImageSize], tuple[Resampled, ...]]
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


def load_model(
    name: str, pretrained: str | None = None, seed: int = 0, options: ModelOptions | None = None
) -> LoadedModel:
    """Load a model on the CPU in float32.

    Args:
        name: an embedded model, an open_clip architecture, or `hf-hub:org/repo`.
        pretrained: None for embedded and hf-hub models; else a tag, a checkpoint's path, or `random`.
        seed: for `random` weights.
        options: what the user says of weights that do not say it themselves.

    Raises:
        ModelError: nothing of that name, the weights cannot be reached or read, do not fit the architecture, or do not
            tell which preprocessing they are for.
    """
    shipped, options = embedded_models(), options or ModelOptions()
    if name in shipped:
        if pretrained not in (None, "embedded", "random"):
            raise ModelError(f"--pretrained {pretrained}: {name} ships with its weights. Leave --pretrained away.")
        if options.said():
            raise ModelError(f"{', '.join(options.said())}: {name} ships with its preprocessing. Leave it away.")
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
        if on_hub:
            return _load_hub(name, options, seed)
        return _load_registry(name, str(pretrained), options, seed)


def _load_embedded(entry: EmbeddedModel, pretrained: str, seed: int) -> LoadedModel:
    torch.manual_seed(seed)
    model: Any = CLIP(**copy.deepcopy(entry.model_cfg))
    if pretrained == "embedded":
        blob = (resources.files("d4c_onnx.models.embedded") / f"{entry.name}.safetensors").read_bytes()
        state = unpack_token_table(load_safetensors(blob))
        model.load_state_dict({key: value.float() for key, value in state.items()})
    size = entry.model_cfg["vision_cfg"]["image_size"]
    said = default_settings() | {"size": (size, size), "quick_gelu": entry.model_cfg["quick_gelu"]}
    settings = Settings(said, dict.fromkeys(said, f"{entry.name} as it ships"))
    tokenizer = SimpleTokenizer(context_length=entry.model_cfg["text_cfg"]["context_length"])
    return _loaded(entry.name, pretrained, model, tokenizer, settings, (), entry)


def _load_registry(name: str, pretrained: str, options: ModelOptions, seed: int) -> LoadedModel:
    """An open_clip architecture with a tag's weights, a file's, or random ones."""
    tags = open_clip.list_pretrained_tags_by_model(name)
    if pretrained in tags:
        if options.like is not None:
            raise ModelError(f"--like {options.like}: --pretrained {pretrained} is a tag itself. Leave --like away.")
        settings, shown = settings_of_tag(name, pretrained, options), pretrained

        def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
            file = open_clip.factory.download_pretrained(open_clip.get_pretrained_cfg(name, pretrained))
            return load_published(model, file, image_size)

    elif pretrained == "random":
        settings, shown = settings_of_random(name, options), pretrained

        def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
            if image_size is not None:
                set_image_size(model, image_size)
            return ()  # of random positions nothing is lost

    else:
        path = _check_checkpoint(name, Path(pretrained), tags)
        beside = [(f"{config} {BESIDE}", said) for config, said in configs_beside(path)]
        checkpoint = read_checkpoint(path)
        settings = settings_of_file(name, str(path), options, [*beside, *checkpoint.stated])
        shown = path.name

        def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
            return fit_checkpoint(model, checkpoint, name, image_size)

    said = settings.values
    model, tokenizer, resampled = _create(name, shown, said["size"], said["quick_gelu"], seed, fill)
    _refuse_resampled(resampled, name, options)
    return _loaded(name, shown, model, tokenizer, settings, resampled, None)


def _load_hub(name: str, options: ModelOptions, seed: int) -> LoadedModel:
    """A repository of the hub, which says all of itself; options go before it."""
    if options.like is not None:
        raise ModelError(f"--like {options.like}: {name} says its own preprocessing. Leave --like away.")

    def fill(model: Any, image_size: ImageSize) -> tuple[Resampled, ...]:
        return load_published(model, open_clip.factory.download_pretrained_from_hf(name.removeprefix(_HUB)), image_size)

    model, tokenizer, resampled = _create(name, "", options.image_size, options.quick_gelu, seed, fill)
    _refuse_resampled(resampled, name, options)
    settings = settings_of_hub(name, model.visual.preprocess_cfg, uses_quick_gelu(model), options)
    return _loaded(name, "hub", model, tokenizer, settings, resampled, None)


def _create(
    name: str, pretrained: str, image_size: ImageSize, quick_gelu: bool | None, seed: int, fill: Fill
) -> tuple[Any, Any, tuple[Resampled, ...]]:
    """A model with its weights, its tokenizer, and the positions that were resampled.

    Args:
        pretrained: for messages.
        image_size, quick_gelu: None: as its config says.
        fill: puts weights in, and makes a timm tower take another image size, where one is given.
    """
    torch.manual_seed(seed)
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")
            vision = {} if image_size is None else _vision(name)
            other = None if image_size == square_or_sides(vision.get("image_size", 224)) else image_size
            by_timm = other is not None and "timm_model_name" in vision
            model = open_clip.create_model(
                name,
                load_weights=False,
                pretrained_text=False,
                force_image_size=None if other is None or by_timm else other[0] if len({*other}) == 1 else other,
                **({} if quick_gelu is None else {"quick_gelu": quick_gelu}),
            )
            tokenizer = open_clip.get_tokenizer(name)
            resampled = fill(model, other if by_timm else None)
    except ModelError:
        raise
    except Exception as error:  # the hub client raises a dozen types, none of them public
        if isinstance(error, ModuleNotFoundError) or "pip install transformers" in str(error):
            package = getattr(error, "name", None) or "transformers"
            raise ModelError(
                f"{name}: needs the Python package {package}. Install it with pip install 'd4c-onnx[hf]'."
            ) from error
        raise ModelError(f"{name} {pretrained}: cannot be loaded ({short(error)}). {WAYS_OUT}") from error
    return model, tokenizer, resampled


def _vision(name: str) -> Mapping[str, Any]:
    """An architecture's `vision_cfg`."""
    return (open_clip.get_model_config(name) or {}).get("vision_cfg", {})


def _check_checkpoint(name: str, path: Path, tags: list[str]) -> Path:
    if path.suffix not in _CHECKPOINTS:
        known = ", ".join(tags) or "none"
        raise ModelError(
            f"--pretrained {path}: neither a tag of {name} ({known}) nor a checkpoint ({', '.join(_CHECKPOINTS)})."
        )
    if not path.is_file():
        raise ModelError(f"--pretrained {path}: no such file.")
    return path


def _refuse_resampled(resampled: tuple[Resampled, ...], name: str, options: ModelOptions) -> None:
    if options.strict and resampled:
        what = "; ".join(f"{one.name} has {one.stored} positions, the model takes {one.taken}" for one in resampled)
        raise ModelError(
            f"--strict: {name} would resample what the weights have for another image size or text length ({what}). "
            "Name the architecture or the --image-size they were trained for, or leave --strict away."
        )


def _loaded(
    name: str,
    pretrained: str,
    model: Any,
    tokenizer: Any,
    settings: Settings,
    resampled: tuple[Resampled, ...],
    entry: EmbeddedModel | None,
) -> LoadedModel:
    model.eval().float().requires_grad_(False)
    size = square_or_sides(model.visual.image_size)
    return LoadedModel(
        name=name,
        pretrained=pretrained,
        model=model,
        tokenizer=tokenizer,
        preprocess=replace(settings.preprocess(), size=size),
        weights_sha256=hash_weights(model),
        quick_gelu=uses_quick_gelu(model),
        embedded=entry,
        sources=settings.sources,
        resampled=resampled,
    )


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
