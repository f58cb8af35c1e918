"""How weights meet their grid: one interface, chosen by the recipe's `quantization.rounding`."""

from importlib import import_module

from d4c_onnx.choices import ROUNDINGS
from d4c_onnx.quantization.rounding.base import QuantizedWeight, RoundedWeights, Rounding, RoundingTask

# A word's value: the table is `choices.ROUNDINGS`, which recipes read, too.
METHODS: dict[str, Rounding] = {
    name: getattr(import_module(f"{__name__}.{choice.module}"), choice.value) for name, choice in ROUNDINGS.items()
}

__all__ = ["METHODS", "QuantizedWeight", "RoundedWeights", "Rounding", "RoundingTask"]
