"""How a layer looks at the value it reads: as which rows. Two layers may read one value in different ways.

A stem's 3x3 and 1x1 convolutions of the same image (FastViT) multiply patches of 27 and of 3 values; a product of the
same value multiplies its last axis. Moments belong to the rows, not to the value.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.layers import weight_position
from d4c_onnx.graph.values import attribute, integers


@dataclass(frozen=True, slots=True)
class InputView:
    """A value, and how a layer reads it; layers of equal views see equal rows.

    Attributes:
        data: the value's name.
        kernel, strides, dilations, pads, groups: of a convolution; a product has no kernel.
        transposed: whether a product sums over the axis before the last: a Gemm's transA, or a weight on the left.
        same: SAME_UPPER or SAME_LOWER, where a convolution's padding follows from the size of what it reads.
    """

    data: str
    kernel: tuple[int, ...] = ()
    strides: tuple[int, ...] = ()
    dilations: tuple[int, ...] = ()
    pads: tuple[int, ...] = ()
    groups: int = 1
    transposed: bool = False
    same: str = ""

    def rows(self, values: np.ndarray) -> np.ndarray:
        """The rows that a weight multiplies: float32 [groups, rows, inputs per group].

        For a convolution each row is one patch, in the weight's own order [channels, kernel height, kernel width].
        """
        if not self.kernel:
            flat = values.swapaxes(-1, -2) if self.transposed else values
            return flat.reshape(1, -1, flat.shape[-1])
        rank, batch, channels = len(self.kernel), *values.shape[:2]
        spans = tuple((size - 1) * step + 1 for size, step in zip(self.kernel, self.dilations, strict=True))
        padded = np.pad(values, [(0, 0), (0, 0), *self._padding(values.shape[2:], spans)])
        windows = np.lib.stride_tricks.sliding_window_view(padded, spans, tuple(range(2, 2 + rank)))
        every: list[Any] = [slice(None, None, stride) for stride in self.strides]
        inside: list[Any] = [slice(None, None, step) for step in self.dilations]
        windows = windows[(slice(None), slice(None), *every, *inside)]
        space = windows.shape[2 : 2 + rank]
        split = windows.reshape(batch, self.groups, channels // self.groups, *space, *self.kernel)
        order = (1, 0, *range(3, 3 + rank), 2, *range(3 + rank, 3 + 2 * rank))
        return np.ascontiguousarray(split.transpose(order).reshape(self.groups, batch * int(np.prod(space)), -1))

    def _padding(self, sizes: tuple[int, ...], spans: tuple[int, ...]) -> list[tuple[int, int]]:
        """Before and behind, along each axis."""
        rank = len(sizes)
        if not self.same:
            return list(zip(self.pads[:rank], self.pads[rank:], strict=True))
        found = []
        for size, span, stride in zip(sizes, spans, self.strides, strict=True):
            total = max(0, (-(-size // stride) - 1) * stride + span - size)
            less, more = total // 2, total - total // 2
            found.append((less, more) if self.same == "SAME_UPPER" else (more, less))
        return found


def input_view(layer: ir.Node, weight_shape: tuple[int, ...], data: str) -> InputView:
    """The view of a weighted node.

    Args:
        layer: MatMul, Gemm or Conv.
        weight_shape: of its weight.
        data: the value it reads.
    """
    if layer.op_type != "Conv":
        return InputView(data, transposed=bool(attribute(layer, "transA", 0)) or weight_position(layer) == 0)
    kernel, auto_pad = weight_shape[2:], attribute(layer, "auto_pad", "NOTSET")
    return InputView(
        data,
        kernel,
        tuple(integers(layer, "strides", len(kernel))),
        tuple(integers(layer, "dilations", len(kernel))),
        tuple(integers(layer, "pads", 2 * len(kernel), 0)),
        attribute(layer, "group", 1),
        same=auto_pad if auto_pad.startswith("SAME") else "",
    )
