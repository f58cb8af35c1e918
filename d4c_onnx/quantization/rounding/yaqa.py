"""GPTAQ with an eye on the embedding: errors are repaired along a layer's inputs, and along its outputs.

What the rounding of a layer does to the embedding is, to second order and with inputs and gradients taken for
independent of each other,

    tr (T - W^)^T H (T - W^) G,      H = E[g g^T],   G = E[x^ x^T],

T being GPTAQ's best float weight. A row whose error is known shifts the best of all rows that are not yet rounded, by
H's share between them, as a column does in GPTQ. Rows are rounded a few at a time in the order of falling H_ii, each
few as GPTAQ would; what is left of H within the few is not used.

Source: YAQA (Tseng et al., arXiv 2505.22988), of which this is LDLQ's feedback along the outputs in blocks of rows;
G and T as in GPTAQ (`gptq`).
"""

from collections.abc import Sequence

import numpy as np

from d4c_onnx.quantization.rounding.base import InputMoments, QuantizedWeight, Rounding, WeightGrid, joined
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, Solved, round_target
from d4c_onnx.quantization.rounding.layerwise import Layerwise
from d4c_onnx.quantization.rounding.waves import trace_rows

# Share of the mean of H's diagonal that is added to it.
_DAMPENING = 0.1

_DEAD = 1e-5  # of the largest weight: what batch norms fold to where a channel died in training

# Rows rounded between two repairs. Of real matrices in groups 8 leave 1 to 11 % less error than 16, and 4 at most 1 %
# less than 8; of 8 bits a channel 8 leave 0.2 % less than 16 (docs/log.md).
_TOGETHER, _TOGETHER_IN_GROUPS = 16, 8


class YaqaRounding(GptaqRounding):
    """GPTAQ, and output moments where there are some."""

    def round(
        self,
        weight: np.ndarray,
        grid: WeightGrid,
        moments: InputMoments | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedWeight:
        """See `LayerRounding.round`."""
        if outputs is None:
            return super().round(weight, grid, moments)
        solved = self.factors(moments)
        target = weight.astype(np.float64) @ solved.shift
        return joined(_round_blocks(np.split(target, len(outputs)), list(outputs), grid, solved))


YAQA: Rounding = Layerwise(YaqaRounding, uses_outputs=True)


def _round_blocks(
    targets: Sequence[np.ndarray], grams: Sequence[np.ndarray], grid: WeightGrid, solved: Solved
) -> list[QuantizedWeight]:
    """Rows [channels, inputs] each, whose gradients have the moments `grams` [channels, channels]."""
    grams = [_without_dead(gram, target) for gram, target in zip(grams, targets, strict=True)]
    orders = [np.argsort(-np.diag(gram), kind="stable") for gram in grams]
    rows = [target[order] for target, order in zip(targets, orders, strict=True)]
    factors = [_factor(gram[np.ix_(order, order)]) for gram, order in zip(grams, orders, strict=True)]
    if grid.group_size:
        found = trace_rows(rows, factors, solved.natural_factor, solved.pivots, grid, _TOGETHER_IN_GROUPS)
    else:
        found = [_few_by_few(part, factor, grid, solved) for part, factor in zip(rows, factors, strict=True)]
    return [one.taken(np.argsort(order)) for one, order in zip(found, orders, strict=True)]


def _few_by_few(rows: np.ndarray, factor: np.ndarray, grid: WeightGrid, solved: Solved) -> QuantizedWeight:
    """Rows in their order, on grids of one scale a channel."""
    parts = []
    for start in range(0, len(rows), _TOGETHER):
        stop = min(start + _TOGETHER, len(rows))
        part = round_target(rows[start:stop], grid, solved)
        error = rows[start:stop] - part.dequantize()
        rows[stop:] -= factor[start:stop, stop:].T @ np.linalg.solve(factor[start:stop, start:stop].T, error)
        parts.append(part)
    return joined(parts)


def _without_dead(gram: np.ndarray, target: np.ndarray) -> np.ndarray:
    """H in which rows that are next to nothing beside others repair nobody, nor are repaired: they stay dead."""
    largest = np.abs(target).max(1)
    dead = largest <= _DEAD * largest.max()
    return np.where((dead[:, None] | dead) & ~np.eye(len(dead), dtype=bool), 0, gram)


def _factor(gram: np.ndarray) -> np.ndarray:
    """Upper Cholesky factor of the inverse of H, float64 [channels, channels]; of the identity where H is zero."""
    wide = gram.astype(np.float64)
    ridge = _DAMPENING * float(np.trace(wide)) / len(wide)
    np.einsum("ii->i", wide)[:] += ridge if ridge > 0 else 1.0
    factor: np.ndarray = np.linalg.cholesky(np.linalg.inv(wide)).T
    return factor
