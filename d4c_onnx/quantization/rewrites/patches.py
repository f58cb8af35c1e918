"""A ViT's patch convolution as the matrix product that it is: exact.

A convolution whose kernel is its stride looks at each patch once, so the patches can be laid out as rows and multiplied
with one matrix. Between a convolution and what follows, its output would have to be integers (a QLinearConv's); a
product's stays float like the rest of the residual stream.
"""

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.values import (
    array,
    attribute,
    insert_before,
    integers,
    is_op,
    is_padded,
    name_of,
    node,
    only_reader,
    set_constant,
    take_over,
)
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _unfold(model: ir.Model) -> Result:
    """The form: a graph input of fixed height and width -> Conv -> Reshape to [batch, channels, patches] -> Transpose
    to [batch, patches, channels]. The product keeps the convolution's name and weight's name.
    """
    for value in model.graph.inputs:
        for conv in [use.node for use in value.uses() if is_op(use.node, "Conv") and use.idx == 0]:
            reason = _unfold_one(model.graph, value, conv)
            return Result(0, (Refusal(conv.name or "", reason),)) if reason else Result(1)
    return Result()


def _unfold_one(graph: ir.Graph, pixels: ir.Value, conv: ir.Node) -> str:
    """Rewrite one convolution; why not, and nothing changed, where its form is another."""
    weight = array(conv.inputs[1])
    if weight is None or weight.ndim != 4 or conv.inputs[1] is None or only_reader(conv.inputs[1]) is None:
        return "its weight is no constant of its own with two spatial axes"
    channels, colours, *kernel = weight.shape
    size = _input_size(pixels)
    flat = only_reader(conv.outputs[0])
    turned = only_reader(flat.outputs[0]) if flat is not None else None
    if size is None or not _looks_once(conv, kernel, size):
        return "its kernel is not its stride, or patches do not cover the picture"
    if flat is None or turned is None or not is_op(flat, "Reshape") or not is_op(turned, "Transpose"):
        return "no Reshape and Transpose lay its output out as tokens"
    shape = array(flat.inputs[1])
    rows, columns = size[0] // kernel[0], size[1] // kernel[1]
    known = shape is not None and shape.shape == (3,)
    if attribute(turned, "perm") != [0, 2, 1] or shape is None or not known:
        return "its output is laid out in another order"
    if list(shape[1:]) not in ([channels, rows * columns], [channels, -1]):
        return "its output is laid out in another shape"
    name = conv.name or ""
    matrix = set_constant(graph, name_of(conv.inputs[1]), weight.reshape(channels, -1).T.astype(np.float32))
    grid_shape = np.array([-1, colours, rows, kernel[0], columns, kernel[1]], np.int64)
    flat_shape = np.array([-1, rows * columns, weight[0].size], np.int64)
    grid = node("Reshape", [pixels, set_constant(graph, f"{name}_grid", grid_shape)], f"{name}_pixels")
    # [batch, rows, columns, colours, kernel height, kernel width]
    split = node("Transpose", [grid.outputs[0]], f"{name}_split", attributes={"perm": [0, 2, 4, 1, 3, 5]})
    patches = node("Reshape", [split.outputs[0], set_constant(graph, f"{name}_flat", flat_shape)], f"{name}_patches")
    product = node("MatMul", [patches.outputs[0], matrix], f"{name}_product", name=name)
    conv.name = f"{name}_convolution"
    nodes = [grid, split, patches, product]
    bias = conv.inputs[2] if len(conv.inputs) > 2 else None
    if bias is not None:
        nodes.append(node("Add", [product.outputs[0], bias], f"{name}_sum", name=f"{name}_bias"))
    insert_before(graph, conv, nodes)
    take_over(turned.outputs[0], nodes[-1].outputs[0])
    return ""


def _looks_once(conv: ir.Node, kernel: list[int], size: tuple[int, int]) -> bool:
    """Each pixel belongs to one patch, and no edge is padded or left over."""
    return (
        not is_padded(conv)
        and integers(conv, "strides", 2) == kernel
        and integers(conv, "dilations", 2) == [1, 1]
        and attribute(conv, "group", 1) == 1
        and size[0] % kernel[0] == 0
        and size[1] % kernel[1] == 0
    )


def _input_size(pixels: ir.Value) -> tuple[int, int] | None:
    sizes = list(pixels.shape or ())
    if len(sizes) != 4 or not all(isinstance(size, int) and size > 0 for size in sizes[2:]):
        return None
    height, width = sizes[2:]
    return (int(height), int(width)) if isinstance(height, int) and isinstance(width, int) else None


UNFOLD_PATCHES = Rewrite("patch convolution as a product", "a float graph whose input is pixels of fixed size", _unfold)
