"""What a file takes and gives, read from its graph."""

import onnx

from d4c_onnx.graph.files import opset_of
from d4c_onnx.manifest import Signature, TensorInfo


def signature(model: onnx.ModelProto) -> Signature:
    """Inputs, outputs and opset of a graph."""
    inputs, outputs = (tuple(_describe(value) for value in side) for side in (model.graph.input, model.graph.output))
    return Signature(inputs, outputs, opset_of(model))


def _describe(value: onnx.ValueInfoProto) -> TensorInfo:
    tensor = value.type.tensor_type
    shape = tuple(dim.dim_param or dim.dim_value for dim in tensor.shape.dim)
    return TensorInfo(value.name, onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, shape)
