"""Shapes and types of a graph's values."""

from math import prod

import onnx
from onnx import helper

from d4c_onnx.graph.files import without_weights

Dims = tuple[int | str | None, ...]
_SMALL = 1024  # values of a constant that may say what shape another value has


def note_shapes(model: onnx.ModelProto) -> None:
    """Note the type and shape of every value that ONNX can infer, in place; for a model of any size.

    Large constants are stood for by their shapes: onnx would write out the whole model, which above 2 GB it cannot.
    """
    shell = without_weights(model)
    for tensor in model.graph.initializer:
        if prod(tensor.dims) <= _SMALL:
            shell.graph.initializer.append(tensor)
        else:
            shell.graph.input.append(helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims))
    inferred = onnx.shape_inference.infer_shapes(shell)
    del model.graph.value_info[:]
    model.graph.value_info.extend(inferred.graph.value_info)


def noted_dims(graph: onnx.GraphProto) -> dict[str, Dims]:
    """Per value what is noted of its axes: a size, a name, or None."""
    return {
        value.name: tuple(dim.dim_value or dim.dim_param or None for dim in value.type.tensor_type.shape.dim)
        for value in graph.value_info
        if value.type.tensor_type.HasField("shape")
    }
