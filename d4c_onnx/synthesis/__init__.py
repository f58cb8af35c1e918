"""D4C synthesis: images from the model itself (arXiv 2511.15411). torch; never onnx or onnxruntime."""

from d4c_onnx.synthesis.process_group import ProcessGroup, init_process_group
from d4c_onnx.synthesis.run import synthesize

__all__ = ["ProcessGroup", "init_process_group", "synthesize"]
