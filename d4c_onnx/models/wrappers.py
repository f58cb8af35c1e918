"""What training code wraps weights in, taken off: the dictionaries around a state dict, and prefixes of its names."""

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch

from d4c_onnx.errors import ModelError
from d4c_onnx.untrusted_json import quoted

# Where trainers put the state dict, beside optimisers and counters; the first that is there is taken.
_AROUND = ("state_dict", "model_state_dict", "model", "module")
# DistributedDataParallel, torch.compile, peft and Lightning's `self.model`; off where every name has it.
_PREFIXES = ("module.", "_orig_mod.", "base_model.", "model.")
# Parts of names that only adapters have: LoRA and DoRA, LoHa, LoKr, IA3.
_ADAPTERS = ("lora_", "hada_", "lokr_", "ia3_")
_COUNTER = "n_averaged"  # torch's AveragedModel keeps it beside the weights


def peel(file: Path, content: Any) -> dict[str, torch.Tensor]:
    """The tensors of a checkpoint by their own names.

    Args:
        file: for messages.
        content: what the file holds.

    Raises:
        ModelError: it holds no tensors, or an adapter's.
    """
    inner = content
    while isinstance(inner, Mapping) and not any(isinstance(value, torch.Tensor) for value in inner.values()):
        around = next((name for name in _AROUND if isinstance(inner.get(name), Mapping)), None)
        if around is None:
            break
        inner = inner[around]
    if not isinstance(inner, Mapping):
        raise ModelError(f"{file}: holds {quoted(type(inner).__name__)}, no state dict. {_SAVE}")
    state = {name: value for name, value in inner.items() if isinstance(name, str) and isinstance(value, torch.Tensor)}
    state.pop(_COUNTER, None)
    if not state:
        names = ", ".join(quoted(name) for name in list(inner)[:5]) or "nothing"
        raise ModelError(f"{file}: holds no tensors (only {names}). {_SAVE}")
    _refuse_adapter(file, state)
    while prefix := next((prefix for prefix in _PREFIXES if all(name.startswith(prefix) for name in state)), None):
        state = {name.removeprefix(prefix): value for name, value in state.items()}
    return state


_SAVE = "Save the model's state_dict() (or {'state_dict': ...}) and try again."


def _refuse_adapter(file: Path, state: Mapping[str, Any]) -> None:
    found = next((name for name in state if any(part.startswith(_ADAPTERS) for part in name.split("."))), None)
    if found is not None:
        raise ModelError(
            f"{file}: is a LoRA adapter, or a model with one in it ({quoted(found)}): changes to weights, which have "
            "to be merged first. With peft: model.merge_and_unload(), then save its state_dict()."
        )
