"""The maths of nearest rounding."""

import numpy as np
from hypothesis import given, settings
from hypothesis import strategies as st
from hypothesis.extra import numpy as hnp

from d4c_onnx.quantization.rounding.base import WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.nearest import NearestRounding, round_to_grid, search_scales

WEIGHTS = hnp.arrays(
    np.float32, hnp.array_shapes(min_dims=2, max_dims=2, max_side=24), elements=st.floats(-100, 100, width=32)
)


@given(WEIGHTS, st.sampled_from([4, 6, 7, 8]))
@settings(deadline=None)
def test_nearest_stays_on_its_grid_and_within_half_a_step(weight: np.ndarray, num_bits: int) -> None:
    rounded = NearestRounding().round(weight, WeightGrid(num_bits))
    low, high = grid_limits(num_bits)
    assert rounded.integers.dtype == np.int8
    assert rounded.integers.min() >= low
    assert rounded.integers.max() <= high
    assert np.isfinite(rounded.scale).all()
    assert (rounded.scale > 0).all()
    inside = np.abs(weight) <= rounded.scale[:, None] * high
    error = np.abs(rounded.dequantize() - weight)
    assert (error[inside] <= np.broadcast_to(rounded.scale[:, None] * 0.5001, weight.shape)[inside] + 1e-30).all()


@given(WEIGHTS, st.sampled_from([4, 6, 7, 8]))
@settings(deadline=None)
def test_searched_scale_is_never_worse_than_the_maximum(weight: np.ndarray, num_bits: int) -> None:
    scale = search_scales(weight, WeightGrid(num_bits))
    high = grid_limits(num_bits)[1]
    largest = np.abs(weight).max(1)
    plain = np.where(largest > 1e-20, largest / high, 1).astype(np.float32)

    def error(scales: np.ndarray) -> np.ndarray:
        return np.square(round_to_grid(weight, scales, WeightGrid(num_bits)) * scales[:, None] - weight).sum(
            1, dtype=np.float64
        )

    # the search's candidates include 1.0 up to its step of a hundredth
    assert (error(scale) <= error(plain) * 1.02 + 1e-12 + 1e-4 * np.square(largest) * weight.shape[1]).all()


def test_values_on_a_grid_survive_exactly() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-8, 8, (5, 64)).astype(np.int8)
    integers[:, 0] = 7
    scale = rng.uniform(0.01, 2, 5).astype(np.float32)
    assert np.array_equal(round_to_grid(integers * scale[:, None], scale, WeightGrid(4)), integers)


def test_zero_channels_are_harmless() -> None:
    weight = np.zeros((2, 8), np.float32)
    weight[1] = 1e-42
    rounded = NearestRounding().round(weight, WeightGrid(4))
    assert not rounded.integers.any()
    assert np.isfinite(rounded.dequantize()).all()
