"""An encoder in float16: weights and products; inputs and outputs stay as they are."""

import onnx
from onnxruntime.transformers.float16 import convert_float_to_float16
from onnxruntime.transformers.onnx_model import OnnxModel

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.files import strip_notes


def convert_to_half(model: onnx.ModelProto) -> onnx.ModelProto:
    """onnxruntime's own conversion; `model` must not be used afterwards.

    Raises:
        GraphError: the converter refused it.
    """
    try:
        half: onnx.ModelProto = convert_float_to_float16(model, keep_io_types=True)
    except Exception as error:  # the converter and onnx's shape inference raise kinds of their own
        raise GraphError(f"onnxruntime's float16 converter refused the graph ({str(error)[:300]}).") from error
    OnnxModel.graph_topological_sort(half.graph)  # it puts the input's Cast last, which ONNX forbids
    strip_notes(half)
    return half
