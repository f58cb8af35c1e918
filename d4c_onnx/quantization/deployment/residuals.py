"""Residual sum, bias and LayerNorm as one kernel of onnxruntime."""

import onnx
from onnx import helper

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, replace_nodes
from d4c_onnx.graph.layers import WeightedLayer, linear_source, weighted_layers
from d4c_onnx.graph.shapes import Dims, noted_dims
from d4c_onnx.quantization.deployment.attention import CONTRIB, use_contrib


def fuse_residuals(model: onnx.ModelProto) -> int:
    """Replace `LayerNormalization(x + (y + bias))` by `com.microsoft.SkipLayerNormalization`, in place; how many.

    The sum is its second result, for the next residual. The same up to rounding. On GPUs each step saved is a pass over
    the tokens and a kernel to launch; on CPUs the operator is slower than its parts. It takes [batch, tokens, width]
    without broadcasting: shapes must be noted (`graph.shapes`), and a sum whose are not stays as it is.
    """
    graph = model.graph
    index, dims = GraphIndex(graph), noted_dims(graph)
    layers = {layer.node: layer for layer in weighted_layers(graph)}
    fused: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for norm in graph.node:
        total = index.producer.get(norm.input[0]) if norm.op_type == "LayerNormalization" else None
        if total is None or total.name in fused or total.op_type != "Add" or len(norm.input) < 3:
            continue
        scale = index.initializers.get(norm.input[1])
        if attribute(norm, "axis", -1) not in (-1, 2) or scale is None or len(scale.dims) != 1:
            continue
        found = next((part for name in total.input if (part := _product(index, layers, name))), None)
        if found is None:
            continue
        summand, value, bias = found
        outer = next(name for name in total.input if name != summand)
        if outer in index.initializers or not _same(dims.get(summand), dims.get(outer)):
            continue
        fused[total.name] = helper.make_node(
            "SkipLayerNormalization",
            [value, outer, *norm.input[1:3], *([bias] if bias else [])],
            [norm.output[0], "", "", total.output[0]],
            name=f"{norm.name}_skip",
            domain=CONTRIB,
            epsilon=attribute(norm, "epsilon", 1e-5),
        )
        gone.add(norm.name)
    if fused:
        replace_nodes(graph, [fused.get(node.name, node) for node in graph.node if node.name not in gone])
        drop_unused(graph)  # the Adds of the biases
        use_contrib(model)
    return len(fused)


def _product(index: GraphIndex, layers: dict[str, WeightedLayer], summand: str) -> tuple[str, str, str] | None:
    """Of a block's output, which has a row for each token: the summand, the product in it, and its bias or nothing."""
    source = linear_source(index, layers, summand) if index.only_consumer(summand) is not None else None
    if source is None or source.layer.op != "MatMul":
        return None
    return summand, source.layer.output, source.bias or ""


def _same(one: Dims | None, other: Dims | None) -> bool:
    """Whether two values are [batch, tokens, width] and neither is repeated along the other."""
    if one is None or other is None or len(one) != 3 or len(other) != 3:
        return False
    axes = list(zip(one, other, strict=True))
    sizes = [pair for pair in axes if all(isinstance(size, int) for size in pair)]
    return all(left == right for left, right in sizes) and not any(1 in pair for pair in axes if pair not in sizes)
