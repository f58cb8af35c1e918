"""How weights meet their grid: one interface, chosen by the recipe's `quantization.rounding`."""

from d4c_onnx.quantization.rounding.base import QuantizedWeight, RoundedWeights, Rounding, RoundingTask
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.layerwise import Layerwise
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.reconstruction import Reconstruction
from d4c_onnx.quantization.rounding.schedule import PUBLISHED, SHORT
from d4c_onnx.quantization.rounding.yaqa import YaqaRounding

METHODS: dict[str, Rounding] = {
    "nearest": Layerwise(NearestRounding),
    "gptq": Layerwise(GptqRounding),
    "gptaq": Layerwise(GptaqRounding),
    "yaqa": Layerwise(YaqaRounding, uses_outputs=True),
    "adaround": Reconstruction(SHORT),
    "adaround-published": Reconstruction(PUBLISHED),
}

__all__ = ["METHODS", "QuantizedWeight", "RoundedWeights", "Rounding", "RoundingTask"]
