"""What a file takes and gives, read from its graph."""

from typing import Any

import onnx

from d4c_onnx.graph.files import opset_of


def signature(graphs: dict[str, onnx.ModelProto]) -> dict[str, Any]:
    """Inputs, outputs and opset per file, read from the graphs."""
    return {
        name: {
            "inputs": [_describe(value) for value in model.graph.input],
            "outputs": [_describe(value) for value in model.graph.output],
            "opset": opset_of(model),
        }
        for name, model in graphs.items()
    }


def _describe(value: onnx.ValueInfoProto) -> dict[str, Any]:
    tensor = value.type.tensor_type
    shape = [dim.dim_param or dim.dim_value for dim in tensor.shape.dim]
    return {"name": value.name, "dtype": onnx.helper.tensor_dtype_to_np_dtype(tensor.elem_type).name, "shape": shape}
