"""ONNX in, ONNX out: ranges, rounding, `quantize_static` with overrides, int4 layouts. Never torch."""

from d4c_onnx.quantization.deployment import target_of
from d4c_onnx.quantization.encoder import EncoderReport, quantize_encoder
from d4c_onnx.quantization.fp16_bundle import find_fp16_bundle, write_fp16_bundle
from d4c_onnx.quantization.quantized_bundle import quantize_bundle_files

__all__ = [
    "EncoderReport",
    "find_fp16_bundle",
    "quantize_bundle_files",
    "quantize_encoder",
    "target_of",
    "write_fp16_bundle",
]
