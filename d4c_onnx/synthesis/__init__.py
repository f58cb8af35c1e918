"""D4C synthesis: images from the model itself (arXiv 2511.15411). torch; never onnx or onnxruntime."""

from d4c_onnx.synthesis.crew import Crew, join_crew
from d4c_onnx.synthesis.run import synthesize

__all__ = ["Crew", "join_crew", "synthesize"]
