"""Rounding the token table: a text tower reads its rows one at a time, so no input moments weigh their errors.

What an error of a row does to the embedding is known where the gradients are: H = E[g g^T] by the looked-up rows. Where
groups share multipliers, rounding a row is GPTQ's problem with the Hessian H. On one scale a row H did not help: what
hurts there is the width of the step. A path through a trellis is a fifth better still, but looking its levels up took
a text tower 5 % of its time, and this takes none.
"""

from dataclasses import dataclass

import numpy as np

from d4c_onnx.graph.trellis import RATES
from d4c_onnx.quantization.rounding.base import InputMoments, stored_bits
from d4c_onnx.quantization.rounding.gptq import GptqRounding, repair
from d4c_onnx.quantization.rounding.groups import search_groups
from d4c_onnx.quantization.rounding.nearest import NearestRounding, WeightGrid

_ROWS = 4096  # at once: floats of a table of many languages would take gigabytes


@dataclass(frozen=True, slots=True, eq=False)
class TokenRows:
    """A rounded table. A value is integer * scale; in groups, (integer + 1/2) * multiplier * scale.

    Attributes:
        integers: int8 [tokens, width].
        scale: float32 [tokens].
        num_bits: of an integer.
        multipliers: uint8 [tokens, groups], 0 to 15; None without groups.
    """

    integers: np.ndarray
    scale: np.ndarray
    num_bits: int
    multipliers: np.ndarray | None = None

    @property
    def bits(self) -> float:
        """A value's, its share of a multiplier included."""
        groups = 0 if self.multipliers is None else self.multipliers.shape[1]
        return stored_bits(self.num_bits, self.integers.shape[1] // groups if groups else 0)

    def dequantize(self) -> np.ndarray:
        """float32 [tokens, width]."""
        if self.multipliers is None:
            return self.integers.astype(np.float32) * self.scale[:, None]
        step = self.multipliers.astype(np.float32) * self.scale[:, None]
        parts = self.integers.reshape(*step.shape, -1) + np.float32(0.5)
        return (parts * step[:, :, None]).reshape(self.integers.shape)


def round_token_rows(
    rows: np.ndarray, num_bits: int, group_size: int = 0, outputs: np.ndarray | None = None
) -> TokenRows:
    """A token table on its grid.

    Args:
        rows: float32 [tokens, width].
        num_bits: 4 or 8.
        group_size: at 4 bits, neighbouring values that share a multiplier; 0: one scale a row.
        outputs: see `gradient_moments`, float32 [blocks, channels of one, channels of one]; none: not known.
    """
    if not group_size:
        rounded = NearestRounding().round(rows, WeightGrid(num_bits))
        return TokenRows(rounded.integers, rounded.scale, num_bits)
    gram = np.eye(rows.shape[1]) if outputs is None else _on_diagonal(outputs.astype(np.float64))
    solved = GptqRounding().factors(InputMoments(gram, gram))
    parts = []
    for start in range(0, len(rows), _ROWS):
        part = rows[start : start + _ROWS]
        scale, multipliers = search_groups(part, group_size, solved.pivots)
        scale = scale * np.float32(2 * RATES[4].steps[1])  # of every second level
        step = np.repeat(multipliers * scale[:, None].astype(np.float64), group_size, axis=1)
        parts.append((_integers(part - step / 2, step, solved.factor, solved.order), scale, multipliers))
    integers, scales, multipliers = map(np.concatenate, zip(*parts, strict=True))
    return TokenRows(integers, scales, num_bits, multipliers)


def _integers(target: np.ndarray, step: np.ndarray, factor: np.ndarray, order: np.ndarray) -> np.ndarray:
    """int8 [tokens, width]: the factor is in act-order, and zeros have a step of zero."""
    integers = np.empty(target.shape, np.int8)
    steps = np.where(step > 0, step, 1.0).T[order]
    integers[:, order] = repair(target.T[order], factor, steps, 4, np.full(len(order), -1)).T
    return integers


def _on_diagonal(blocks: np.ndarray) -> np.ndarray:
    """One matrix of square blocks."""
    count, size, _ = blocks.shape
    whole = np.zeros((count, size, count, size), blocks.dtype)
    each = np.arange(count)
    whole[each, :, each] = blocks
    return whole.reshape(count * size, -1)
