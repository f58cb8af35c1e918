"""Tower -> FP32 ONNX: trace, clean, check against torch, describe."""

from d4c_onnx.export.fp32_bundle import export_fp32

__all__ = ["export_fp32"]
