"""A ViT's patch convolution as the matrix product that it is: exact.

A convolution whose kernel is its stride looks at each patch once, so the patches can be laid out as rows and multiplied
with one matrix. Between a convolution and what follows, its output would have to be integers (a QLinearConv's); a
product's stays float like the rest of the residual stream.
"""

import numpy as np
import onnx
from onnx import helper

from d4c_onnx.graph.index import (
    GraphIndex,
    attribute,
    drop_unused,
    integers_attribute,
    is_padded,
    replace_nodes,
    set_initializer,
)


def unfold_patches(model: onnx.ModelProto) -> bool:
    """Rewrite the patch convolution in place; False (and nothing changed) where there is none.

    The form: a graph input of fixed height and width -> Conv -> Reshape to [batch, channels, patches] -> Transpose to
    [batch, patches, channels]. The product keeps the convolution's name and weight's name.
    """
    graph = model.graph
    index = GraphIndex(graph)
    conv = next((node for node in graph.node if node.op_type == "Conv" and node.input[0] in index.inputs), None)
    weight = None if conv is None else index.array(conv.input[1])
    if conv is None or weight is None or weight.ndim != 4 or len(index.consumers[conv.input[1]]) != 1:
        return False
    channels, colours, *kernel = weight.shape
    size = _input_size(graph, conv.input[0])
    flat = index.only_consumer(conv.output[0])
    turned = index.only_consumer(flat.output[0]) if flat is not None else None
    if size is None or flat is None or turned is None or not _looks_once(conv, kernel, size):
        return False
    if (flat.op_type, turned.op_type) != ("Reshape", "Transpose") or attribute(turned, "perm") != [0, 2, 1]:
        return False
    shape = index.array(flat.input[1])
    rows, columns = size[0] // kernel[0], size[1] // kernel[1]
    if shape is None or shape.shape != (3,) or list(shape[1:]) not in ([channels, rows * columns], [channels, -1]):
        return False
    name = conv.name
    set_initializer(graph, conv.input[1], weight.reshape(channels, -1).T.astype(np.float32))
    set_initializer(graph, f"{name}_grid", np.array([-1, colours, rows, kernel[0], columns, kernel[1]], np.int64))
    set_initializer(graph, f"{name}_flat", np.array([-1, rows * columns, weight[0].size], np.int64))
    grid, split, patches = f"{name}_pixels", f"{name}_split", f"{name}_patches"
    bias = conv.input[2] if len(conv.input) > 2 else ""
    product = f"{name}_product" if bias else turned.output[0]
    nodes = [
        helper.make_node("Reshape", [conv.input[0], f"{name}_grid"], [grid], name=grid),
        # [batch, rows, columns, colours, kernel height, kernel width]
        helper.make_node("Transpose", [grid], [split], name=split, perm=[0, 2, 4, 1, 3, 5]),
        helper.make_node("Reshape", [split, f"{name}_flat"], [patches], name=patches),
        helper.make_node("MatMul", [patches, conv.input[1]], [product], name=name),
    ]
    if bias:
        nodes.append(helper.make_node("Add", [product, bias], [turned.output[0]], name=f"{name}_bias"))
    gone = {flat.name, turned.name}
    kept = [node for node in graph.node if node.name not in gone]
    replace_nodes(graph, [new for node in kept for new in (nodes if node.name == name else [node])])
    drop_unused(graph)
    return True


def _looks_once(conv: onnx.NodeProto, kernel: list[int], size: tuple[int, int]) -> bool:
    """Each pixel belongs to one patch, and no edge is padded or left over."""
    return (
        not is_padded(conv)
        and integers_attribute(conv, "strides", 2) == kernel
        and integers_attribute(conv, "dilations", 2) == [1, 1]
        and attribute(conv, "group", 1) == 1
        and size[0] % kernel[0] == 0
        and size[1] % kernel[1] == 0
    )


def _input_size(graph: onnx.GraphProto, name: str) -> tuple[int, int] | None:
    value = next(entry for entry in graph.input if entry.name == name)
    dims = [dim.dim_value for dim in value.type.tensor_type.shape.dim]
    return (dims[2], dims[3]) if len(dims) == 4 and dims[2] > 0 and dims[3] > 0 else None
