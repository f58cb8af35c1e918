"""Average pools as depthwise convolutions with equal weights.

onnxruntime's integer pool (QLinearAveragePool) looks every value up as a float, adds, and rounds again; its depthwise
integer convolution adds in vectors. The same numbers, in less time (docs/performance.md).
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

# What keeps the number of channels, from a pool back to the convolution that sets it.
_KEEPS_CHANNELS = ("Relu", "Add", "Clip", "AveragePool", "MaxPool", "QuantizeLinear", "DequantizeLinear")


def convolve_pools(model: onnx.ModelProto) -> list[str]:
    """Rewrite every AveragePool between integers, in place.

    Args:
        model: a QDQ encoder whose weights are still stored in 8 bits.

    Returns:
        The initialisers that hold the new weights, int8 ones, one for each size of a pool. Empty where there is none; a
        pool that pads, or whose channels are not to be found, stays as it is.
    """
    graph = model.graph
    index = GraphIndex(graph)
    fresh: dict[str, list[onnx.NodeProto]] = {}
    weights: dict[str, None] = {}  # pools of one size share theirs
    for pool in graph.node:
        kernel = integers_attribute(pool, "kernel_shape", 2) if pool.op_type == "AveragePool" else []
        maker, reader = index.producer.get(pool.input[0]), index.only_consumer(pool.output[0])
        between = maker is not None and reader is not None
        if not kernel or not between or not _plain(pool) or _op(maker) != "DequantizeLinear":
            continue
        channels = _channels(index, pool.input[0])
        if _op(reader) != "QuantizeLinear" or channels is None:
            continue
        name = f"pool_{channels}x{kernel[0]}x{kernel[1]}"
        stored, scale, real = f"{name}_quantized", f"{name}_scale", f"{pool.name}_weight"
        weights[stored] = None
        set_initializer(graph, stored, np.ones((channels, 1, *kernel), np.int8))
        set_initializer(graph, scale, np.array(1 / (kernel[0] * kernel[1]), np.float32))
        strides = integers_attribute(pool, "strides", 2)
        fresh[pool.name] = [
            helper.make_node("DequantizeLinear", [stored, scale], [real], name=real),
            helper.make_node(
                *("Conv", [pool.input[0], real], [pool.output[0]], pool.name),
                kernel_shape=kernel,
                strides=strides,
                group=channels,
            ),
        ]
    replace_nodes(graph, [new for node in graph.node for new in fresh.get(node.name, [node])])
    drop_unused(graph)
    return list(weights)


def _op(node: onnx.NodeProto | None) -> str:
    return "" if node is None else node.op_type


def _plain(pool: onnx.NodeProto) -> bool:
    whole = not attribute(pool, "ceil_mode", 0) and integers_attribute(pool, "dilations", 2) == [1, 1]
    return whole and not is_padded(pool)


def _channels(index: GraphIndex, name: str) -> int | None:
    """The second axis of a value, read from the convolution that it comes from."""
    while (maker := index.producer.get(name)) is not None:
        if maker.op_type == "Conv":
            weight = index.producer.get(maker.input[1])
            stored = index.initializers.get(maker.input[1] if weight is None else weight.input[0])
            return None if stored is None else int(stored.dims[0])
        if maker.op_type not in _KEEPS_CHANNELS:
            return None
        name = maker.input[0]
    return None
