"""How weights meet their grid: one interface, chosen by the recipe's `quantization.rounding`."""

from d4c_onnx.errors import RecipeError
from d4c_onnx.quantization.rounding.base import QuantizedWeight, Rounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding

_METHODS: dict[str, type[Rounding]] = {"nearest": NearestRounding}

__all__ = ["QuantizedWeight", "Rounding", "make_rounding"]


def make_rounding(name: str) -> Rounding:
    """The method of that name.

    Raises:
        RecipeError: there is none.
    """
    if name not in _METHODS:
        raise RecipeError(f"quantization.rounding: {name} is not supported. Use one of {', '.join(sorted(_METHODS))}.")
    return _METHODS[name]()
