"""ONNX in, ONNX out: ranges, rounding, `quantize_static` with overrides, int4 layouts. Never torch."""

from d4c_onnx.quantization.bundle import quantize_bundle_files
from d4c_onnx.quantization.encoder import EncoderReport, quantize_encoder

__all__ = ["EncoderReport", "quantize_bundle_files", "quantize_encoder"]
