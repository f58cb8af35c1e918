"""D4C synthesis: images from the model itself (arXiv 2511.15411). torch; never onnx or onnxruntime."""

from d4c_onnx.synthesis.run import calibration_key, synthesize

__all__ = ["calibration_key", "synthesize"]
