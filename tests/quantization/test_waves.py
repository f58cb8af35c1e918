"""Rows that repair each other, many of them side by side: as good as one few after the other."""

import numpy as np
import pytest

from d4c_onnx.quantization.rounding.base import InputMoments, WeightGrid, joined
from d4c_onnx.quantization.rounding.gptq import GptqRounding, Solved, round_target
from d4c_onnx.quantization.rounding.trellis_search import block_width
from d4c_onnx.quantization.rounding.waves import trace_rows


def _gram(rng: np.random.Generator, size: int) -> np.ndarray:
    few, many = rng.standard_normal((size // 4, size)), rng.standard_normal((2 * size, size))
    gram: np.ndarray = few.T @ few / len(few) + 0.3 * many.T @ many / len(many)
    return gram


def _solved(gram: np.ndarray) -> Solved:
    return GptqRounding(0.01).factors(InputMoments(gram, gram))


@pytest.mark.parametrize("num_bits", [3, 4, 5])
@pytest.mark.parametrize(("rows", "inputs"), [(48, 192), (20, 144), (7, 16)])
def test_side_by_side_as_one_after_the_other(rows: int, inputs: int, num_bits: int, rng: np.random.Generator) -> None:
    """Also where rows are no multiple of those that are taken together, and inputs none of a block."""
    outputs, gram = _gram(rng, rows), _gram(rng, inputs)
    target, grid, solved = rng.standard_normal((rows, inputs)), WeightGrid(num_bits, 16), _solved(gram)
    factor = np.linalg.cholesky(np.linalg.inv(outputs)).T

    def cost(values: np.ndarray) -> float:
        return float(np.trace(outputs @ (target - values) @ gram @ (target - values).T))

    open_, parts = target.copy(), []
    for start in range(0, rows, 4):
        stop = min(start + 4, rows)
        parts.append(round_target(open_[start:stop], grid, solved))
        lost = np.linalg.solve(factor[start:stop, start:stop].T, open_[start:stop] - parts[-1].dequantize())
        open_[stop:] -= factor[start:stop, stop:].T @ lost
    [found] = trace_rows([target], [factor], solved.natural_factor, solved.pivots, grid, 4)
    assert found.integers.shape == (rows, inputs)
    assert cost(found.dequantize()) < 1.1 * cost(joined(parts).dequantize())
    alone = round_target(target, grid, solved)  # no row repairs another
    assert cost(found.dequantize()) < (0.9 if rows > 8 else 1.0) * cost(alone.dequantize())


def test_rows_that_do_not_repair_each_other_are_rounded_as_without(rng: np.random.Generator) -> None:
    target, solved = rng.standard_normal((24, 128)), _solved(_gram(rng, 128))
    [found] = trace_rows([target], [np.eye(24)], solved.natural_factor, solved.pivots, WeightGrid(4, 16), 8)
    plain = round_target(target, WeightGrid(4, 16), solved)
    np.testing.assert_array_equal(found.scale, plain.scale)
    assert (found.integers == plain.integers).mean() > 0.99  # products of other shapes may break a tie otherwise


def test_several_matrices_at_once_are_each_as_alone(rng: np.random.Generator) -> None:
    solved, grid = _solved(_gram(rng, 96)), WeightGrid(4, 16)
    targets = [rng.standard_normal((rows, 96)) for rows in (24, 10)]
    factors = [np.linalg.cholesky(np.linalg.inv(_gram(rng, rows))).T for rows in (24, 10)]
    both = trace_rows(targets, factors, solved.natural_factor, solved.pivots, grid, 8)
    for target, factor, found in zip(targets, factors, both, strict=True):
        [alone] = trace_rows([target], [factor], solved.natural_factor, solved.pivots, grid, 8)
        np.testing.assert_array_equal(found.scale, alone.scale)
        assert (found.integers == alone.integers).mean() > 0.99


@pytest.mark.parametrize(
    ("inputs", "size", "width"),
    [(384, 16, 64), (48, 16, 48), (80, 16, 16), (336, 16, 48), (128, 64, 64), (128, 128, 128)],
)
def test_blocks_are_equal_and_hold_whole_groups(inputs: int, size: int, width: int) -> None:
    assert block_width(inputs, size) == width
