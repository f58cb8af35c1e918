"""A quantised product and the bias behind it as one kernel of onnxruntime."""

import onnx
from onnx import helper

from d4c_onnx.graph.index import GraphIndex, drop_unused, replace_nodes
from d4c_onnx.graph.layers import INTEGER_PRODUCT, added_constant
from d4c_onnx.quantization.deployment.attention import CONTRIB, use_contrib
from d4c_onnx.quantization.deployment.products import find_product


def fuse_biases(model: onnx.ModelProto) -> int:
    """Replace QDQ products and their biases by `com.microsoft.MatMulIntegerToFloat`, in place; returns how many.

    onnxruntime makes that kernel of every QDQ product anyway, but leaves the Add, one more pass over what the product
    made. The answer is the same up to float32 rounding. Such a product is QDQ no more: onnxruntime alone reads it. One
    without a bias stays as it is, and so does any whose weight is not an int8 matrix with zero points 0.
    """
    graph = model.graph
    index = GraphIndex(graph)
    fused: dict[str, onnx.NodeProto] = {}
    gone: set[str] = set()
    for node in graph.node:
        product, found = find_product(index, node), added_constant(index, node.output[0])
        if product is None or found is None or node.op_type == INTEGER_PRODUCT:
            continue
        add, bias = found
        if list(index.initializers[bias].dims) != [product.shape[1]]:
            continue
        integers, scale, zero = product.data
        inputs = [integers, product.weight, scale, product.scale, zero, "", bias]
        fused[node.name] = helper.make_node(INTEGER_PRODUCT, inputs, [add.output[0]], name=node.name, domain=CONTRIB)
        gone.add(add.name)
    if fused:
        replace_nodes(graph, [fused.get(node.name, node) for node in graph.node if node.name not in gone])
        drop_unused(graph)
        use_contrib(model)
    return len(fused)
