"""Weights from a file into an open_clip model, as open_clip's own loader puts them there, and what it does not tell.

That loader resamples position embeddings of another image size or text length and says so in a log only.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import load_checkpoint, load_state_dict
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import LARGEST_SIDE, Resampled
from d4c_onnx.models.preprocessing import WITHIN, Source, default_settings
from d4c_onnx.untrusted_json import QUOTED

# Numbers that OpenAI's published state dicts carry beside the weights, and nobody else's do
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_IMAGE = "visual.positional_embedding"
_TEXT = ("positional_embedding", "text.positional_embedding")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a file, and what the file says beside them."""

    file: Path
    state: dict[str, Any]
    stated: tuple[Source, ...]


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a file; nothing that is pickled in it is run.

    Raises:
        ModelError: it cannot be read.
    """
    try:
        state = load_state_dict(str(file), weights_only=True)
    except (SafetensorError, OSError, EOFError) as error:
        raise ModelError(f"{file}: cannot be read as a checkpoint ({short(error)}). Is the file complete?") from error
    except Exception as error:  # torch's unpickler raises what the file makes it raise
        raise ModelError(
            f"{file}: cannot be read with weights_only ({short(error)}). Save it as .safetensors and try again."
        ) from error
    own = {name: state.pop(name) for name in _OPENAI if name in state}
    if len(own) < len(_OPENAI):
        return Checkpoint(file, state, ())
    side = _number(file, "input_resolution", own["input_resolution"])
    said = default_settings() | {"quick_gelu": True, "size": (side, side)}
    return Checkpoint(file, state, ((f"OpenAI's {', '.join(_OPENAI)} {WITHIN}", said),))


def fit_checkpoint(
    model: Any, checkpoint: Checkpoint, name: str, image_size: tuple[int, int] | None
) -> tuple[Resampled, ...]:
    """Load a checkpoint's tensors; the positions that were resampled.

    Args:
        image_size: what `load_tensors` takes.

    Raises:
        ModelError: they do not fit the architecture of that name.
    """
    try:
        return load_tensors(model, checkpoint.state, image_size)
    except Exception as error:  # open_clip's converters index and reshape whatever the file holds
        lines = [line.strip() for line in str(error).splitlines() if line.strip()]
        # torch's first line names the class, the next ones the tensors
        told = lines[1] if len(lines) > 1 else lines[0] if lines else type(error).__name__
        raise ModelError(
            f"{checkpoint.file}: the weights do not fit {name} ({short(told)}). Name the architecture they belong to."
        ) from error


def load_published(model: Any, file: str, image_size: tuple[int, int] | None) -> tuple[Resampled, ...]:
    """Load what open_clip has downloaded, as `load_tensors`; raises whatever open_clip does."""
    if Path(file).suffix in (".npz", ".npy"):  # big_vision's layout, in open_clip's own converter
        load_checkpoint(model, file)
        return () if image_size is None else set_image_size(model, image_size)
    return load_tensors(model, load_state_dict(file, weights_only=True), image_size)


def load_tensors(model: Any, state: dict[str, Any], image_size: tuple[int, int] | None) -> tuple[Resampled, ...]:
    """`open_clip.factory.load_checkpoint`, strictly, of tensors instead of a file; raises whatever torch does.

    Args:
        state: by name; changed.
        image_size: height and width that a timm tower is to take, where its own are others.

    Returns:
        The positions that were resampled.
    """
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for scalar in ("logit_scale", "logit_bias"):  # a scalar in one layout, a vector of one in another
        own = getattr(model, scalar, None)
        if scalar in state and own is not None:
            state[scalar] = state[scalar].reshape(own.shape)
    if "logit_bias" not in state and getattr(model, "logit_bias", None) is not None:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    ids = "text.transformer.embeddings.position_ids"  # a buffer of older releases of transformers
    if ids in state and ids not in model.state_dict():
        del state[ids]
    if image_size is not None and any(state[n].shape[1] != c for n, c in _grids(model).items() if n in state):
        set_image_size(model, image_size)  # the weights are of another size already
        image_size = None
    before = _positions(state)
    for name in before:  # torch cannot resample float16 on a CPU
        state[name] = state[name].float()
    resize_pos_embed(state, model)
    resize_text_pos_embed(state, model)
    after = _positions(state)
    model.load_state_dict(state, strict=True)
    return _changed(before, after) + (() if image_size is None else set_image_size(model, image_size))


def set_image_size(model: Any, image_size: tuple[int, int]) -> tuple[Resampled, ...]:
    """Make one of timm's towers take another height and width; the positions that were resampled."""
    before = _grids(model)
    model.visual.set_input_size(image_size)
    return _changed(before, _grids(model))


def short(error: object) -> str:
    """An error of another library, on one line and not too long."""
    text = " ".join(str(error).split())
    return text if len(text) <= QUOTED else f"{text[: QUOTED - 3]}..."


def _changed(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Resampled, ...]:
    return tuple(Resampled(name, count, after[name]) for name, count in before.items() if after[name] != count)


def _positions(state: Mapping[str, Any]) -> dict[str, int]:
    return {name: int(state[name].shape[0]) for name in (_IMAGE, *_TEXT) if name in state}


def _grids(model: Any) -> dict[str, int]:
    """Positions of timm's towers: [1, count, width]."""
    named = model.visual.named_parameters(prefix="visual")
    return {name: int(value.shape[1]) for name, value in named if name.endswith("pos_embed") and value.ndim == 3}


def _number(file: Path, name: str, value: Any) -> int:
    """A pixel count, as a number or a tensor of one."""
    try:
        found = int(value)
    except (TypeError, ValueError, RuntimeError) as error:
        raise ModelError(f"{file}: {name} is no number. Is it one of OpenAI's checkpoints?") from error
    if not 1 <= found <= LARGEST_SIDE:
        raise ModelError(f"{file}: {name} is {short(found)}, which no image size is. Is the file damaged?")
    return found
