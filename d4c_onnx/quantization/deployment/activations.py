"""GELU apart from the bias before it."""

import onnx

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, set_initializer


def separate_gelu(model: onnx.ModelProto) -> int:
    """Keep onnxruntime from making one BiasGelu of a bias and GELU, in place; returns how many.

    Release 1.32 computes GELU alone in one pass where the processor has AVX-512; the kernel for both takes three, and a
    buffer of its own. The fusion asks for a bias of one axis, so these get two: [1, width] adds the same. GELU by tanh
    is left alone: fused with its bias (FastGelu) it is as fast or faster.
    """
    graph = model.graph
    index = GraphIndex(graph)
    count = 0
    for node in graph.node:
        exact = node.op_type == "Gelu" and attribute(node, "approximate", b"none") == b"none"
        add = index.producer.get(node.input[0]) if exact else None
        if add is None or add.op_type != "Add" or index.only_consumer(add.output[0]) is None:
            continue
        for position, name in enumerate(add.input):
            bias = index.array(name)
            if bias is not None and bias.ndim == 1:
                own = f"{name}_apart"
                set_initializer(graph, own, bias.reshape(1, -1))
                add.input[position] = own
                count += 1
    if count:
        drop_unused(graph)
    return count
