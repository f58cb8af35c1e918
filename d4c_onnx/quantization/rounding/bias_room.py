"""Room for biases: every channel has a scale on which its bias fits int32, and is not coarse.

A Conv's or Gemm's bias is stored in int32 on the scale of the products, weight scale x input scale, and added to their
integer sum. A channel that training left for dead (3e-9 beside 17.6, once its batch norm is folded) keeps its bias, and
on its own scale that would take more than 32 bits: `quantize_static` then enlarges the scale, and the integers are no
longer those that the rounding chose; older releases clip the bias without a word.

So a channel's scale is at least the one on which its bias takes a quarter of int32. The rest is for the sum itself, and
for what `corrections` change afterwards. Where that raises a scale, weights are rounded to nearest once more, many of
them to zero: with a bias of 2**29 steps, half a step in each of N weights moves the output by less than N 2.4e-7 of
the bias. The same holds where the input's scale is small because the input hardly differs from a constant.

A channel of zeros has no scale of its own. It gets that one, too: on a unit grid its bias would be rounded to multiples
of the input's scale.
"""

from dataclasses import replace

import numpy as np

from d4c_onnx.graph.values import array, dims, nodes_by_name
from d4c_onnx.quantization.rounding.base import QuantizedWeight, RoundingTask, WeightGrid
from d4c_onnx.quantization.rounding.nearest import round_to_grid
from d4c_onnx.quantization.rounding.trellis_search import trace_nearest

_LARGEST_BIAS = 2.0**29  # in steps of its scale; onnxruntime asks for 2**31
_TINY = float(np.finfo(np.float32).tiny)  # below it float32 loses bits: the least scale of products


def least_scales(task: RoundingTask) -> dict[str, np.ndarray]:
    """The least scale of each channel, float32 [channels], by weight initialiser; of layers with an integer input.

    0 where there is no bias: any scale will do. A weight that several layers share has the largest of theirs.
    """
    graph, nodes = task.model.graph, nodes_by_name(task.model.graph)
    found: dict[str, np.ndarray] = {}
    for layer in task.plan.layers:
        if layer.data not in task.ranges:
            continue
        channels = (dims(graph.initializers[layer.weight]) or ())[layer.channel_axis]
        bias = None if layer.op == "MatMul" else array((*nodes[layer.node].inputs, None, None)[2])
        size = np.zeros(1) if bias is None else np.abs(np.asarray(bias, np.float64)).ravel()
        if len(size) != channels:  # one for all, or one for each row, too: the largest will do
            size = np.full(channels, size.max(initial=0))
        products = np.where(size > 0, np.maximum(size / _LARGEST_BIAS, _TINY), 0)
        least = products / task.ranges[layer.data].scale
        found[layer.weight] = np.maximum(least, found.get(layer.weight, 0)).astype(np.float32)
    return found


def with_room(
    weight: np.ndarray, rounded: QuantizedWeight, grid: WeightGrid, least: np.ndarray | None
) -> QuantizedWeight:
    """A rounded weight whose scales are at least these, and these in channels of zeros; the same object if they are.

    Args:
        weight: float32 [channels, inputs].
        rounded: the same on this grid.
        least: float32 [channels], 0 where any scale will do; None: everywhere.
    """
    if least is None:
        return rounded
    raised = rounded.scale < least
    moved = raised | ((least > 0) & ~rounded.integers.any(1))
    if not moved.any():
        return rounded
    scale, path = np.where(moved, least, rounded.scale).astype(np.float32), rounded.path
    if path is None:
        integers = rounded.integers.copy()
        integers[raised] = round_to_grid(weight[raised], scale[raised], grid)
        return replace(rounded, integers=integers, scale=scale)
    codes, multipliers = path.codes.copy(), path.multipliers.copy()
    if raised.any():
        near = np.ceil(multipliers[raised] * (rounded.scale / scale)[raised, None])  # steps as wide as before
        given = weight[raised], scale[raised], near.astype(np.uint8)
        codes[raised], multipliers[raised] = trace_nearest(*given, rounded.num_bits)
    return QuantizedWeight.on_path(codes, multipliers, scale, rounded.num_bits)
