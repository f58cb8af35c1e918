"""Weights whose products are added in 16 bits, two by two, and what that asks of them.

On x86 without VNNI onnxruntime multiplies uint8 by int8 with an instruction that adds neighbouring products along a
sum in 16 bits, and cuts what does not fit: 255 (w1 + w2) does where w1 and w2 are of one sign and |w1 + w2| > 128.
Two weights of different signs never do. So nearly all of [-128, 127] may be used, where laying all weights out on
[-64, 63], as onnxruntime's `reduce_range` does, costs a bit of each.

Neighbours are inputs 2 k and 2 k + 1 of a product. A convolution sums over its kernel's places, and over channels at
each place; where each channel is a group of its own onnxruntime multiplies in 32 bits.

Source: onnxruntime's MLAS, `QgemmU8X8KernelAvx2` (vpmaddubsw).
"""

from math import prod

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.values import attribute

LARGEST_SUM = 128  # of two weights of one sign: 255 * 128 < 2**15


def partners_of(node: ir.Node, shape: tuple[int, ...], channel_axis: int) -> np.ndarray:
    """The input that each is added to first, int [inputs]; itself where there is none.

    Args:
        node: a MatMul, Gemm or Conv.
        shape: of its weight.
        channel_axis: of the weight; inputs are all other axes, in their order.
    """
    if node.op_type != "Conv":
        depth = shape[-1] if channel_axis == len(shape) - 2 else shape[-2]
        if len(shape) == 2:
            depth = shape[1 - channel_axis]
        within = np.arange(prod(shape) // shape[channel_axis]).reshape(-1, depth)
        return _swapped(within).ravel()
    channels, places = shape[1], prod(shape[2:])
    flat = np.arange(channels * places)
    if channels == 1 and attribute(node, "group", 1) == shape[0]:
        return flat
    summed = flat.reshape(channels, places).T.reshape(1, -1)  # as they are summed: places, and channels at each
    found = np.empty_like(flat)
    found[summed[0]] = _swapped(summed)[0]
    return found


def _swapped(lines: np.ndarray) -> np.ndarray:
    """Neighbours in each other's place; the last of an odd line stays."""
    swapped, even = lines.copy(), lines.shape[1] // 2 * 2
    swapped[:, 0:even:2], swapped[:, 1:even:2] = lines[:, 1:even:2], lines[:, 0:even:2]
    return swapped


def fit_pairs(integers: np.ndarray, partners: np.ndarray) -> None:
    """Bring two weights that are too large together nearer to zero, each by half of what is too much; in place.

    Args:
        integers: [channels, inputs], whole numbers of any type.
        partners: see `partners_of`.
    """
    [first] = np.nonzero(np.arange(len(partners)) < partners)
    one, other = (integers[:, places].astype(np.int32) for places in (first, partners[first]))
    over = np.where(one * other > 0, np.abs(one + other) - LARGEST_SUM, 0)
    rows, columns = np.nonzero(over > 0)
    excess = over[rows, columns]
    for places, part in ((first, excess - excess // 2), (partners[first], excess // 2)):
        values = integers[rows, places[columns]]
        integers[rows, places[columns]] = values - np.sign(values) * part


def limits_beside(partner: np.ndarray, low: int, high: int) -> tuple[np.ndarray, np.ndarray]:
    """Least and greatest integer beside one that is chosen already, per channel."""
    least = np.where(partner < 0, np.maximum(low, -LARGEST_SUM - partner), low)
    return least, np.where(partner > 0, np.minimum(high, LARGEST_SUM - partner), high)
