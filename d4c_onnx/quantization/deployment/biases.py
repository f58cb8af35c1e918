"""A quantised product and the bias behind it as one kernel of onnxruntime."""

import onnx
from onnx import TensorProto, helper

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, replace_nodes
from d4c_onnx.graph.layers import INTEGER_PRODUCT, added_constant
from d4c_onnx.quantization.deployment.attention import CONTRIB, use_contrib


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
    for product in graph.node:
        if product.op_type != "MatMul":
            continue
        data, weight = (index.producer.get(name) for name in product.input)
        if data is None or weight is None or not _is_activation(index, data):
            continue
        found = added_constant(index, product.output[0])
        if found is None or list(index.initializers[found[1]].dims) != [_columns(index, weight)]:
            continue
        add, bias = found
        inputs = [data.input[0], weight.input[0], data.input[1], weight.input[1], data.input[2], "", bias]
        fused[product.name] = helper.make_node(
            INTEGER_PRODUCT, inputs, [add.output[0]], name=product.name, domain=CONTRIB
        )
        gone.add(add.name)
    if fused:
        replace_nodes(graph, [fused.get(node.name, node) for node in graph.node if node.name not in gone])
        drop_unused(graph)
        use_contrib(model)
    return len(fused)


def _is_activation(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """A DequantizeLinear with one scale and one zero point, of what the graph computes."""
    single = all(index.array(name) is not None and index.constant(name).size == 1 for name in node.input[1:])
    return (
        node.op_type == "DequantizeLinear"
        and len(node.input) == 3
        and node.input[0] not in index.initializers
        and single
    )


def _columns(index: GraphIndex, node: onnx.NodeProto) -> int:
    """The columns of a dequantised constant int8 matrix (stored as int4 behind a Cast, or not) with one scale or one a
    column, and zero points 0; of anything else 0."""
    maker = index.producer.get(node.input[0])
    unpacked = maker is not None and maker.op_type == "Cast" and attribute(maker, "to") == TensorProto.INT8
    tensor = index.initializers.get(maker.input[0] if maker is not None and unpacked else node.input[0])
    if node.op_type != "DequantizeLinear" or tensor is None or len(tensor.dims) != 2:
        return 0
    scale, zero = index.array(node.input[1]), index.array(node.input[2]) if len(node.input) > 2 else None
    exact = (unpacked or tensor.data_type == TensorProto.INT8) and (zero is None or not zero.any())
    per_column = scale is not None and (
        scale.size == 1 or (scale.shape == (tensor.dims[1],) and attribute(node, "axis", 1) in (1, -1))
    )
    return int(tensor.dims[1]) if exact and per_column else 0
