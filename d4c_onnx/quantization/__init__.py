"""ONNX in, ONNX out: ranges, rounding, `quantize_static` with overrides, int4 layouts. Never torch."""

from d4c_onnx.quantization.deployment import target_of
from d4c_onnx.quantization.encoder import EncoderReport, quantize_encoder
from d4c_onnx.quantization.half import find_half_bundle, half_bundle_files
from d4c_onnx.quantization.quantized_bundle import quantize_bundle_files

__all__ = [
    "EncoderReport",
    "find_half_bundle",
    "half_bundle_files",
    "quantize_bundle_files",
    "quantize_encoder",
    "target_of",
]
