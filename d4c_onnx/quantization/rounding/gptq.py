"""GPTQ, and its asymmetric variant: round one input column after the other, repairing the error in those still open.

Minimise E |W x - W^ x^|^2 over W^ on the grid. Completing the square with G = E[x^ x^T] and C = E[x x^T] gives

    E |W x - W^ x^|^2 = tr (T - W^) G (T - W^)^T + const,      T = W C G^-1,

so the best float weight is T, and rounding it is GPTQ's problem with the Hessian G. Columns are rounded in the order
of falling G_jj (act-order); the error of a column, divided by its pivot in the Cholesky factor of G^-1, is taken out of
the columns that are not yet rounded.

Where inputs share multipliers in groups the columns come as they lie, along a path through a trellis (`trellis`).

Source: GPTQ (Frantar et al., arXiv 2210.17323, algorithm 1, act-order); the asymmetric target follows GPTAQ (Li et al.,
arXiv 2504.02692), here in closed form before the rounding instead of column by column.
"""

from dataclasses import dataclass
from functools import cached_property

import numpy as np

from d4c_onnx.quantization.rounding.base import InputMoments, QuantizedWeight, Rounding, WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.groups import search_groups
from d4c_onnx.quantization.rounding.layerwise import Layerwise
from d4c_onnx.quantization.rounding.nearest import search_scales
from d4c_onnx.quantization.rounding.pairs import limits_beside
from d4c_onnx.quantization.rounding.trellis_search import trace

_BLOCK = 64  # inputs repaired one by one before the rest is repaired in one product


class GptqRounding:
    """GPTQ with x^ = x rounded to its own grid: one pass over the data serves all layers."""

    uses_data = True
    sequential = False

    def __init__(self, dampening: float = 0.3) -> None:
        """`dampening`: share of the mean of G's diagonal that is added to it (GPTQ's percdamp).

        Published is 0.01, for data like those that are served; synthetic images know less of real moments.
        """
        self.dampening = dampening
        self._solved: tuple[InputMoments, Solved] | None = None

    def round(
        self,
        weight: np.ndarray,
        grid: WeightGrid,
        moments: InputMoments | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedWeight:
        """See `LayerRounding.round`."""
        solved = self.factors(moments)
        return round_target(weight.astype(np.float64) @ solved.shift, grid, solved)

    def factors(self, moments: InputMoments | None) -> "Solved":
        """What rounding needs to know of the inputs, kept for the next call."""
        assert moments is not None
        # q, k and v come one after the other with the same moments: the factors are worth keeping for the next call
        if self._solved is None or self._solved[0] is not moments:
            self._solved = None  # the room of the last factors is needed for the next
            self._solved = moments, _solve(moments, self.dampening)
        return self._solved[1]


def round_target(target: np.ndarray, grid: WeightGrid, solved: "Solved") -> QuantizedWeight:
    """Rows of best float weights onto their grid.

    Args:
        target: float64 [channels, inputs].
        grid: see `LayerRounding.round`.
        solved: of the inputs.
    """
    wanted = target.astype(np.float32)
    if grid.group_size:
        scale, near = search_groups(wanted, grid.group_size, solved.pivots, grid.num_bits)
        codes, multipliers = trace(target / scale[:, None], solved.natural_factor, near, grid.num_bits)
        return QuantizedWeight.on_path(codes, multipliers, scale, grid.num_bits)
    scale, order = search_scales(wanted, grid, solved.importance), solved.order
    before = np.full(len(order), -1)  # where an input's partner came, in act-order; -1: it comes later
    if grid.partners is not None:
        place = np.argsort(order)
        partner = place[grid.partners[order]]
        before = np.where(partner < np.arange(len(order)), partner, -1)
    integers = np.empty(target.shape, np.int8)
    steps = np.broadcast_to(scale.astype(np.float64)[:, None], target.shape)
    integers[:, order] = repair(target.T[order], solved.factor, steps.T, grid.num_bits, before).T
    return QuantizedWeight(integers, scale, grid.num_bits)


class GptaqRounding(GptqRounding):
    """GPTQ layer after layer, x^ carrying the errors of all layers before."""

    sequential = True


GPTQ: Rounding = Layerwise(GptqRounding)
GPTAQ: Rounding = Layerwise(GptaqRounding)


@dataclass
class Solved:
    """What all weights that read one input share: C G^-1, diag(G), 1 / diag(G^-1), act-order, G^-1."""

    shift: np.ndarray
    importance: np.ndarray
    pivots: np.ndarray
    order: np.ndarray
    inverse: np.ndarray

    @cached_property
    def factor(self) -> np.ndarray:
        """Upper triangular factor of G^-1 in act-order."""
        factor: np.ndarray = np.linalg.cholesky(self.inverse[np.ix_(self.order, self.order)]).T
        return factor

    @cached_property
    def natural_factor(self) -> np.ndarray:
        """The same in the inputs' own order."""
        factor: np.ndarray = np.linalg.cholesky(self.inverse).T
        return factor


def _solve(moments: InputMoments, dampening: float) -> Solved:
    inputs = len(moments.gram)
    ridge = dampening * max(float(np.trace(moments.gram)) / inputs, 1e-12)
    gram = _with_ridge(moments.gram, ridge)
    importance, inverse = np.diag(gram).copy(), np.linalg.inv(gram)
    del gram  # one of these matrices is 134 MB for a ViT-L
    order = np.argsort(-np.diag(moments.gram), kind="stable")
    # the same ridge on C: with no quantisation error (C = G) the target is W itself
    shift = _with_ridge(moments.cross, ridge) @ inverse
    pivots = 1 / np.maximum(np.diag(inverse), 1e-30)
    return Solved(shift, importance, pivots, order, inverse)


def _with_ridge(matrix: np.ndarray, ridge: float) -> np.ndarray:
    added = matrix.copy()
    np.einsum("ii->i", added)[:] += ridge
    return added


def repair(target: np.ndarray, factor: np.ndarray, steps: np.ndarray, num_bits: int, before: np.ndarray) -> np.ndarray:
    """int8 [inputs, channels]; all in act-order, the channels of an input beside each other, as they are read.

    Args:
        target: float64 [inputs, channels].
        factor: float64 [inputs, inputs], upper Cholesky factor of the inverse Gram.
        steps: float64 [inputs, channels], positive.
        num_bits: of the grid.
        before: int [inputs], the partner that is rounded already, or -1.
    """
    low, high = grid_limits(num_bits)
    target = target.copy()
    integers = np.empty(target.shape, np.int8)
    for start in range(0, len(target), _BLOCK):
        stop = min(start + _BLOCK, len(target))
        errors = np.empty((stop - start, target.shape[1]))
        for row in range(start, stop):
            step, error = steps[row], errors[row - start]
            rounded = np.rint(target[row] / step)
            np.minimum(np.maximum(rounded, low, out=rounded), high, out=rounded)
            if before[row] >= 0:
                rounded = np.clip(rounded, *limits_beside(integers[before[row]].astype(np.int64), low, high))
            integers[row] = rounded
            np.subtract(target[row], rounded * step, out=error)
            error /= factor[row, row]
            target[row + 1 : stop] -= factor[row, row + 1 : stop, None] * error
        target[stop:] -= factor[start:stop, stop:].T @ errors
    return integers
