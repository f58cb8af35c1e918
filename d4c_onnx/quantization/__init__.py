"""ONNX in, ONNX out: ranges, rounding, `quantize_static` with overrides, int4 layouts. torch only inside AdaRound."""

from d4c_onnx.quantization.encoder import quantize_encoder
from d4c_onnx.quantization.encoder_report import EncoderReport
from d4c_onnx.quantization.fp16_bundle import find_fp16_bundle, write_fp16_bundle
from d4c_onnx.quantization.promise_search import Judges
from d4c_onnx.quantization.promised_bundle import quantize_to_promise
from d4c_onnx.quantization.quantized_bundle import quantize_bundle_files
from d4c_onnx.quantization.targets import target_of

__all__ = [
    "EncoderReport",
    "Judges",
    "find_fp16_bundle",
    "quantize_bundle_files",
    "quantize_encoder",
    "quantize_to_promise",
    "target_of",
    "write_fp16_bundle",
]
