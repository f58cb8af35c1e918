"""Batch norm into the convolution before it: exact.

A BatchNormalization in inference is y = g (x - m) / sqrt(v + e) + b, channel by channel. With x = W * u + c,

    y = (a W) * u + a (c - m) + b,      a = g / sqrt(v + e).

The exporter's own optimiser folds most of them; this one is for graphs that come from elsewhere. It has to come before
the rounding: folded afterwards, `a` would pull the weights off their grid.
"""

import numpy as np
import onnx

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, set_initializer


def fold_batch_norms(model: onnx.ModelProto) -> int:
    """Fold every BatchNormalization that follows a Conv of its own, in place; returns how many.

    Left alone: a Conv whose output or weight something else reads too, and statistics that are not constants.
    """
    graph = model.graph
    folded = 0
    norms: list[onnx.NodeProto] = [node for node in graph.node if node.op_type == "BatchNormalization"]
    for norm in norms:
        index = GraphIndex(graph)
        conv = index.producer.get(norm.input[0])
        if conv is None or conv.op_type != "Conv" or index.only_consumer(conv.output[0]) is not norm:
            continue
        own = [name for name in conv.input[1:3] if name]
        statistics = [index.array(name) for name in norm.input[1:5]]
        if any(array is None for array in statistics) or any(len(index.consumers[name]) > 1 for name in own):
            continue
        weight = index.array(conv.input[1])
        bias = index.array(conv.input[2]) if len(own) == 2 else np.zeros(1, np.float32)
        if weight is None or bias is None:
            continue
        gain, shift, mean, variance = (np.asarray(array, np.float64) for array in statistics)
        factor = gain / np.sqrt(variance + _epsilon(norm))
        moved = weight.astype(np.float64) * factor.reshape(-1, *[1] * (weight.ndim - 1))
        set_initializer(graph, conv.input[1], moved.astype(np.float32))
        name = own[1] if len(own) == 2 else f"{conv.input[1]}_folded_bias"
        set_initializer(graph, name, (factor * (bias.astype(np.float64) - mean) + shift).astype(np.float32))
        del conv.input[2:]
        conv.input.append(name)
        conv.output[0] = norm.output[0]
        graph.node.remove(norm)
        folded += 1
    if folded:
        drop_unused(graph)
    return folded


def _epsilon(norm: onnx.NodeProto) -> float:
    found = attribute(norm, "epsilon", 1e-5)
    return float(found) if isinstance(found, float) else 1e-5
