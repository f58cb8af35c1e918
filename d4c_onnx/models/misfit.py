"""Weights that are not those of the architecture they were named with: what differs, and which ones they would fit."""

import re
from collections.abc import Iterator, Mapping
from typing import Any

import open_clip
import torch

from d4c_onnx.untrusted_json import quoted

_SHOWN = 5
_BUILT = 24  # architectures whose tensors are compared; their text towers agree already
_FITTING = 5
_TABLES = ("token_embedding.weight", "text.token_embedding.weight")
_POSITIONS = ("visual.positional_embedding", "positional_embedding", "text.positional_embedding")
# How transformers names what open_clip calls otherwise
_TRANSFORMERS = ("vision_model.", "text_model.")


def differences(model: torch.nn.Module, state: Mapping[str, torch.Tensor]) -> list[str]:
    """Each tensor that is missing, of another shape, or too many, as a line with both shapes."""
    own = model.state_dict()
    lines = []
    for name, value in own.items():
        stored = state.get(name)
        if stored is None or stored.shape != value.shape:
            found = "is not in the file" if stored is None else f"is {_shape(stored)}"
            lines.append(f"{name} {found}, and {_shape(value)} in the architecture")
    lines += [
        f"{quoted(name)} is {_shape(value)}, and not in the architecture"
        for name, value in state.items()
        if name not in own
    ]
    return lines


def misfit(file: str, name: str, lines: list[str], state: Mapping[str, torch.Tensor]) -> str:
    """The message about weights that do not fit: the first differences, and where to go."""
    more = f"\n  and {len(lines) - _SHOWN} more" if len(lines) > _SHOWN else ""
    shown = "".join(f"\n  {line}" for line in lines[:_SHOWN])
    return f"{file}: the weights do not fit {name}:{shown}{more}\n{_way_out(state, name)}"


def fitting(state: Mapping[str, torch.Tensor]) -> list[str]:
    """open_clip's architectures that have just these names and shapes; any number of positions, which are resampled.

    Nothing is allocated: towers are built without memory, and only where the text tower's sizes are right.
    """
    wanted = _shapes(state)
    found: list[tuple[int, str]] = []
    for count, name in enumerate(_candidates(state)):
        if count == _BUILT or len(found) == _FITTING:
            break
        try:
            with torch.device("meta"):
                model = open_clip.create_model(name, device="meta", load_weights=False, pretrained_text=False)
        except Exception:  # a tower that cannot be built without memory, or wants the hub: it is not proposed
            continue
        own = model.state_dict()
        if _shapes(own) == wanted:
            resampled = sum(own[key].shape != state[key].shape for key in _POSITIONS if key in own and key in state)
            found.append((resampled, name))
    return [name for _, name in sorted(found, key=lambda entry: entry[0])]


def _way_out(state: Mapping[str, torch.Tensor], name: str) -> str:
    if any(key.startswith(_TRANSFORMERS) for key in state):
        return (
            "These are transformers' names. Name the folder that holds them with their config.json in place of "
            f"{name}; it is converted."
        )
    names = [other for other in fitting(state) if other != name]
    if names:
        return f"They would fit {', '.join(names)}. Name the architecture that they belong to."
    return "No architecture of open_clip has these shapes. Describe one of your own: --config FILE.json."


def _candidates(state: Mapping[str, torch.Tensor]) -> Iterator[str]:
    """Architectures whose text tower has the sizes that the tensors have."""
    table = next((state[name] for name in _TABLES if name in state), None)
    if table is None or table.ndim != 2:
        return
    layers = _count(state, r"(?:text\.)?transformer\.resblocks\.(\d+)\.")
    custom = _TABLES[1] in state
    for name in open_clip.list_models():
        config = open_clip.get_model_config(name) or {}
        text = config.get("text_cfg", {})
        sizes = (text.get("vocab_size", 49408), text.get("width", 512))
        same = "hf_model_name" not in text and sizes == tuple(table.shape) and text.get("layers", 12) == layers
        if same and (not custom or config.get("custom_text", False)):
            yield name


def _count(state: Mapping[str, Any], pattern: str) -> int:
    return len({found[1] for name in state if (found := re.match(pattern, name))})


def _shapes(state: Mapping[str, torch.Tensor]) -> dict[str, tuple[int, ...]]:
    """Names without the custom towers' prefix -> shapes, positions without their number, scalars as such."""
    return {
        name.removeprefix("text."): tuple(value.shape[1:] if name in _POSITIONS else value.shape)
        for name, value in state.items()
        if name not in ("logit_scale", "logit_bias")
    }


def _shape(value: torch.Tensor) -> str:
    return " x ".join(map(str, value.shape)) or "one number"
