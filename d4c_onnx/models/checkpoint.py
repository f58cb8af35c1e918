"""Weights from a file into an open_clip model, as open_clip's own loader puts them there, and what it does not tell.

That loader resamples position embeddings of another image size or text length and says so in a log only.
"""

import re
from collections.abc import Mapping
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from open_clip.convert import convert_state_dict
from open_clip.factory import load_checkpoint
from open_clip.model import convert_to_custom_text_state_dict, resize_pos_embed, resize_text_pos_embed
from safetensors import SafetensorError
from safetensors.torch import load_file

from d4c_onnx.errors import ModelError
from d4c_onnx.manifest import LARGEST_SIDE, Resampled
from d4c_onnx.models.misfit import differences, misfit
from d4c_onnx.models.preprocessing import WITHIN, default_settings
from d4c_onnx.models.settings import Source
from d4c_onnx.models.torchscript import is_torchscript, read_torchscript
from d4c_onnx.models.wrappers import peel
from d4c_onnx.untrusted_json import check_readable, quoted, short

# Numbers that OpenAI's published state dicts carry beside the weights, and nobody else's do
_OPENAI = ("input_resolution", "context_length", "vocab_size")
_IMAGE = "visual.positional_embedding"
_TEXT = ("positional_embedding", "text.positional_embedding")


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The tensors of a file by name, and what the file says beside them."""

    file: Path
    state: dict[str, torch.Tensor]
    stated: tuple[Source, ...]


def read_checkpoint(file: Path) -> Checkpoint:
    """Read a file, wrappers taken off; nothing that is pickled in it is run.

    Raises:
        ModelError: it cannot be read, holds no tensors, or an adapter's.
    """
    state = peel(file, _content(file))
    own = {name: state.pop(name) for name in _OPENAI if name in state}
    if len(own) < len(_OPENAI):
        return Checkpoint(file, state, ())
    side = _number(file, "input_resolution", own["input_resolution"])
    said = replace(default_settings(), quick_gelu=True, size=(side, side))
    return Checkpoint(file, state, ((f"OpenAI's {', '.join(_OPENAI)} {WITHIN}", said),))


def _content(file: Path) -> Any:
    """What a file holds."""
    check_readable(file, ModelError)
    try:
        if file.suffix == ".safetensors":
            return load_file(file)
        if is_torchscript(file):
            return read_torchscript(file)
        return torch.load(file, map_location="cpu", weights_only=True)
    except ModelError:
        raise
    except (SafetensorError, OSError, EOFError) as error:
        raise ModelError(f"{file}: cannot be read as a checkpoint ({short(error)}). Is the file complete?") from error
    except Exception as error:  # torch's unpickler raises what the file makes it raise
        raise ModelError(f"{file}: {_why_unread(error)}") from error


def _why_unread(error: Exception) -> str:
    """What torch's unpickler stumbled over, and the way out; the rest of its message is about torch's own options."""
    asked = re.search(r"GLOBAL (\S+)", str(error))
    if asked is None:
        return f"cannot be read with weights_only ({short(error)}). Save it as .safetensors and try again."
    return (
        f"holds more than tensors: reading it would call {quoted(asked[1])}, so it is not read. Where you trust it, "
        "load it in its own program, and save the state_dict() alone, as .safetensors."
    )


def load_published(model: Any, file: str, name: str, image_size: tuple[int, int] | None) -> tuple[Resampled, ...]:
    """Load what open_clip has downloaded, as `load_tensors`."""
    if Path(file).suffix in (".npz", ".npy"):  # big_vision's layout, in open_clip's own converter
        load_checkpoint(model, file)
        return () if image_size is None else set_image_size(model, image_size)
    return load_tensors(model, read_checkpoint(Path(file)), name, image_size)


def load_tensors(
    model: Any, checkpoint: Checkpoint, name: str, image_size: tuple[int, int] | None
) -> tuple[Resampled, ...]:
    """`open_clip.factory.load_checkpoint`, strictly, of tensors instead of a file, whatever float they are stored in.

    Args:
        name: of the architecture, for messages.
        image_size: height and width that a timm tower is to take, where its own are others.

    Returns:
        The positions that were resampled.

    Raises:
        ModelError: the tensors do not fit that architecture, or are no weights.
    """
    file = str(checkpoint.file)
    try:
        state = _converted(model, dict(checkpoint.state))
        if image_size is not None and any(state[n].shape[1] != c for n, c in _grids(model).items() if n in state):
            set_image_size(model, image_size)  # the weights are of another size already
            image_size = None
        before = _positions(state)
        for position in before:  # torch cannot resample float16 on a CPU
            state[position] = state[position].float()
        resize_pos_embed(state, model)
        resize_text_pos_embed(state, model)
    except Exception as error:  # open_clip's converters index and reshape whatever the file holds
        lines = differences(model, checkpoint.state) or [short(error)]
        raise ModelError(misfit(file, name, lines, checkpoint.state)) from error
    lines = differences(model, state)
    if lines:
        raise ModelError(misfit(file, name, lines, checkpoint.state))
    _refuse_values(file, model, state)
    after = _positions(state)
    model.load_state_dict(state, strict=True)
    return _changed(before, after) + (() if image_size is None else set_image_size(model, image_size))


def _converted(model: Any, state: dict[str, torch.Tensor]) -> dict[str, torch.Tensor]:
    """Tensors under the model's names, where only names and layouts differ."""
    state = convert_state_dict(model, state)
    if "positional_embedding" in state and not hasattr(model, "positional_embedding"):
        state = convert_to_custom_text_state_dict(state)
    for scalar in ("logit_scale", "logit_bias"):  # a scalar in one layout, a vector of one in another
        own = getattr(model, scalar, None)
        if scalar in state and own is not None:
            state[scalar] = state[scalar].reshape(own.shape)
    if "logit_bias" not in state and getattr(model, "logit_bias", None) is not None:
        state["logit_bias"] = torch.zeros_like(state["logit_scale"])
    own = model.state_dict()
    for name, buffer in model.named_buffers():
        # made anew by every model, and stored by older releases of transformers (position_ids) and TorchScript (masks)
        if name not in own and name in state and state[name].shape == buffer.shape:
            del state[name]
    return state


def _refuse_values(file: str, model: Any, state: Mapping[str, torch.Tensor]) -> None:
    """Refuse what no training ends in: numbers that are not finite, and integers where floats belong."""
    own = model.state_dict()
    for name, value in state.items():
        if not own[name].is_floating_point():
            continue
        if not value.is_floating_point():
            kind = str(value.dtype).removeprefix("torch.")
            raise ModelError(
                f"{file}: {quoted(name)} holds {kind}, not floating point. Quantised weights are no weights to start "
                "from: pass those from before."
            )
        wrong = value.numel() - int(torch.isfinite(value.float()).sum())
        if wrong:
            raise ModelError(
                f"{file}: {quoted(name)} holds {wrong} values of {value.numel()} that are NaN or infinite. The "
                "training diverged, or the file is damaged: pass an earlier checkpoint."
            )


def set_image_size(model: Any, image_size: tuple[int, int]) -> tuple[Resampled, ...]:
    """Make one of timm's towers take another height and width; the positions that were resampled."""
    before = _grids(model)
    model.visual.set_input_size(image_size)
    return _changed(before, _grids(model))


def _changed(before: Mapping[str, int], after: Mapping[str, int]) -> tuple[Resampled, ...]:
    return tuple(Resampled(name, count, after[name]) for name, count in before.items() if after[name] != count)


def _positions(state: Mapping[str, torch.Tensor]) -> dict[str, int]:
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
