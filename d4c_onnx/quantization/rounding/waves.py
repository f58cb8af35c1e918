"""Paths through the trellis for rows that are rounded a few after the other, many of them side by side.

Where errors are repaired along outputs, too, a few rows wait for those before. But a block of their inputs waits for
two things only: the block before of the same rows, and the same block of the rows before. So each step takes all rows
that have begun one block further, and numpy has many of them at once. In the third step that is block 3 of the first
few rows, 2 of the next few, and 1 of those after.

Scale and multipliers of a row are looked for when it begins, with what is known by then of the rows before: the search
along the path tries the multipliers' neighbours, too, and files come out alike.

Source: the wavefront of loops that depend on their neighbours (Lamport, 1974).
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from d4c_onnx.graph.trellis import RATES
from d4c_onnx.quantization.rounding.base import QuantizedWeight, WeightGrid
from d4c_onnx.quantization.rounding.groups import search_groups
from d4c_onnx.quantization.rounding.trellis_search import block_width, trace_block


def trace_rows(
    targets: Sequence[np.ndarray],
    factors: Sequence[np.ndarray],
    along_inputs: np.ndarray,
    pivots: np.ndarray,
    grid: WeightGrid,
    together: int,
) -> list[QuantizedWeight]:
    """Round matrices whose rows repair each other, all of the same inputs.

    Args:
        targets: float64 [channels, inputs] each, in the order in which rows are rounded.
        factors: float64 [channels, channels] each, upper Cholesky factor of the inverse of H.
        along_inputs: float64 [inputs, inputs], the same of the inputs' Gram matrix.
        pivots: float64 [inputs], how much an input's error counts.
        grid: in groups.
        together: rows that do not repair each other.
    """
    width, inputs = block_width(len(pivots), grid.group_size), len(pivots)
    blocks = [slice(start, start + width) for start in range(0, inputs, width)]
    own = np.stack([along_inputs[block, block] for block in blocks])
    parts = [
        _Rows.of(target, factor, inputs // grid.group_size, together)
        for target, factor in zip(targets, factors, strict=True)
    ]
    for step in range(max(len(part.few) for part in parts) + len(blocks) - 1):
        for part in parts:
            part.begin(step, pivots, grid)
        moves = [
            (part, number, step - number)
            for part in parts
            for number in range(max(0, step + 1 - len(blocks)), min(step + 1, len(part.few)))
        ]
        asked = zip(*(part.next_of(number, blocks[at]) for part, number, at in moves), strict=True)
        wanted, near, state = (np.concatenate(values) for values in asked)
        found = trace_block(wanted.T, own[[at for *_, at in moves]], near, state, RATES[grid.num_bits])
        each = zip(*(np.split(values.T, len(moves)) for values in found), strict=True)
        for (part, number, at), got in zip(moves, each, strict=True):
            part.take(number, blocks[at], got, along_inputs)
    return [part.rounded(len(target), grid.num_bits) for part, target in zip(parts, targets, strict=True)]


@dataclass(slots=True, eq=False)
class _Rows:
    """A matrix on its way.

    Attributes:
        few: rows that are rounded together.
        open_: float64 [channels, inputs], best values given the rows before.
        repair: float64 [channels, inputs], what the errors of a row's inputs before take from them.
        shares: of few rows after the other, float64 [channels after, channels], what of a difference they take over.
        scale, near, state, codes, multipliers: of each row, as in `trellis_search`.
    """

    few: list[slice]
    open_: np.ndarray
    repair: np.ndarray
    shares: list[np.ndarray]
    scale: np.ndarray
    near: np.ndarray
    state: np.ndarray
    codes: np.ndarray
    multipliers: np.ndarray

    @classmethod
    def of(cls, target: np.ndarray, factor: np.ndarray, groups: int, together: int) -> "_Rows":
        """Filled up with rows of zeros, which repair nothing, to a multiple of `together`."""
        rows, inputs = target.shape
        more = -rows % together
        whole = np.eye(rows + more)
        whole[:rows, :rows] = factor
        few = [slice(start, start + together) for start in range(0, rows + more, together)]
        shape = (rows + more, inputs)
        return cls(
            few=few,
            open_=np.pad(target, ((0, more), (0, 0))),
            repair=np.zeros(shape),
            shares=[np.linalg.solve(whole[own, own], whole[own, own.stop :]).T for own in few],
            scale=np.ones(rows + more, np.float32),
            near=np.zeros((rows + more, groups), np.uint8),
            state=np.zeros(rows + more, np.intp),
            codes=np.zeros(shape, np.uint8),
            multipliers=np.zeros((rows + more, groups), np.uint8),
        )

    def begin(self, number: int, pivots: np.ndarray, grid: WeightGrid) -> None:
        """Scale and multipliers of the rows whose turn it is."""
        if number < len(self.few):
            few = self.few[number]
            found = search_groups(self.open_[few].astype(np.float32), grid.group_size, pivots, grid.num_bits)
            self.scale[few], self.near[few] = found

    def next_of(self, number: int, block: slice) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """What is wanted, float64 [channels, inputs] in units of the int8 grid, multipliers to try, and the states."""
        few = self.few[number]
        wanted = (self.open_[few, block] - self.repair[few, block]) / self.scale[few, None]
        return wanted, self.near[few, self._groups(block)], self.state[few]

    def take(self, number: int, block: slice, got: tuple[np.ndarray, ...], along_inputs: np.ndarray) -> None:
        """What came of it: codes, errors, multipliers and states, [channels, ...]. Repair inputs and rows after."""
        few, (codes, errors, multipliers, state) = self.few[number], got
        self.codes[few, block], self.multipliers[few, self._groups(block)], self.state[few] = codes, multipliers, state
        self.repair[few, block.start :] += (errors * self.scale[few, None]) @ along_inputs[block, block.start :]
        # what is repaired up to here is, with the block's own errors, all the difference to the best values
        self.open_[few.stop :, block] -= self.shares[number] @ self.repair[few, block]

    def _groups(self, block: slice) -> slice:
        size = self.codes.shape[1] // self.near.shape[1]
        return slice(block.start // size, block.stop // size)

    def rounded(self, rows: int, num_bits: int) -> QuantizedWeight:
        """Without the rows of zeros."""
        return QuantizedWeight.on_path(self.codes[:rows], self.multipliers[:rows], self.scale[:rows], num_bits)
