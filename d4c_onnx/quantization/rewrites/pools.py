"""Average pools as depthwise convolutions with equal weights.

onnxruntime's integer pool (QLinearAveragePool) looks every value up as a float, adds, and rounds again; its depthwise
integer convolution adds in vectors. The same numbers, in less time (docs/performance.md).
"""

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.stored import stored_weight
from d4c_onnx.graph.values import (
    attribute,
    insert_before,
    integers,
    is_op,
    is_padded,
    maker,
    node,
    nodes_of,
    only_reader,
    set_constant,
    take_over,
)
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite

# What keeps the number of channels, from a pool back to the convolution that sets it.
_KEEPS_CHANNELS = ("Relu", "Add", "Clip", "AveragePool", "MaxPool", "QuantizeLinear", "DequantizeLinear")


def _convolve(model: ir.Model) -> Result:
    """The new weights are int8 ones, one initialiser for each size of a pool."""
    count, refused = 0, []
    for pool in nodes_of(model.graph, "AveragePool"):
        between = is_op(maker(pool.inputs[0]), "DequantizeLinear")
        if not between or not is_op(only_reader(pool.outputs[0]), "QuantizeLinear"):
            refused.append(Refusal(pool.name or "", "it does not stand between integers"))
            continue
        channels = _channels(pool.inputs[0])
        if channels is None or not _plain(pool):
            refused.append(Refusal(pool.name or "", "it pads, or its channels are not to be found"))
            continue
        _convolve_one(model.graph, pool, channels)
        count += 1
    return Result(count, tuple(refused))


def _convolve_one(graph: ir.Graph, pool: ir.Node, channels: int) -> None:
    kernel, name = integers(pool, "kernel_shape", 2), pool.name or ""
    size = f"pool_{channels}x{kernel[0]}x{kernel[1]}"
    stored = set_constant(graph, f"{size}_quantized", np.ones((channels, 1, *kernel), np.int8))
    scale = set_constant(graph, f"{size}_scale", np.array(1 / (kernel[0] * kernel[1]), np.float32))
    real = node("DequantizeLinear", [stored, scale], f"{name}_weight")
    attributes = {"kernel_shape": kernel, "strides": integers(pool, "strides", 2), "group": channels}
    inputs = [pool.inputs[0], real.outputs[0]]
    conv = node("Conv", inputs, f"{name}_convolved", name=f"{name}_convolution", attributes=attributes)
    insert_before(graph, pool, [real, conv])
    take_over(pool.outputs[0], conv.outputs[0])


def _plain(pool: ir.Node) -> bool:
    whole = not attribute(pool, "ceil_mode", 0) and integers(pool, "dilations", 2) == [1, 1]
    return whole and not is_padded(pool)


def _channels(value: ir.Value | None) -> int | None:
    """The second axis of a value, read from the convolution that it comes from."""
    while (made := maker(value)) is not None:
        if is_op(made, "Conv"):
            weight = stored_weight(made)
            return None if weight is None else weight.shape[0]
        if not is_op(made, *_KEEPS_CHANNELS):
            return None
        value = made.inputs[0]
    return None


CONVOLVE_POOLS = Rewrite("average pools as depthwise convolutions", "a QDQ graph with int8 weights", _convolve)
