"""How weights meet their grid: one interface, chosen by the recipe's `quantization.rounding`."""

from collections.abc import Callable

from d4c_onnx.errors import RecipeError
from d4c_onnx.quantization.rounding.base import InputMoments, QuantizedWeight, Rounding
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding

_METHODS: dict[str, Callable[[float], Rounding]] = {
    "nearest": lambda damping: NearestRounding(),
    "gptq": GptqRounding,
    "gptaq": GptaqRounding,
}

__all__ = ["InputMoments", "QuantizedWeight", "Rounding", "make_rounding"]


def make_rounding(name: str, damping: float = 0.1) -> Rounding:
    """The method of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in _METHODS:
        raise RecipeError(f"quantization.rounding: {name} is not supported. Use one of {', '.join(sorted(_METHODS))}.")
    return _METHODS[name](damping)
