"""Weights in groups: a small integer a group, a float scale a channel, products on the channel's int8 grid."""

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.quantization.plan import InputGroups
from d4c_onnx.quantization.rounding import QuantizedWeight
from d4c_onnx.quantization.rounding.base import InputMoments, LayerRounding, stored_bits
from d4c_onnx.quantization.rounding.gptq import GptaqRounding, GptqRounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding

GROUPS = st.builds(InputGroups, st.sampled_from([2, 16, 32]), st.sampled_from([8, 15]))
LIMITS = {8: (-64, 56), 15: (-120, 105)}


def _weight(seed: int, channels: int, inputs: int, spread: float) -> np.ndarray:
    """Channels and groups of quite different sizes; some of them zero."""
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((channels, inputs)) * np.exp(spread * rng.standard_normal((channels, inputs)))
    weight[rng.random(channels) < 0.1] = 0
    weight[:, : inputs // 4] *= rng.random() < 0.7
    return weight.astype(np.float32)


def _moments(seed: int, inputs: int) -> InputMoments:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, inputs)) @ rng.standard_normal((inputs, inputs)) / np.sqrt(inputs)
    seen = x + 0.1 * rng.standard_normal(x.shape)
    return InputMoments(seen.T @ seen / len(x), x.T @ seen / len(x))


def _check(rounded: QuantizedWeight, groups: InputGroups) -> None:
    channels, inputs = rounded.integers.shape
    multipliers = rounded.multipliers
    assert multipliers is not None
    assert (multipliers.dtype, multipliers.shape) == (np.uint8, (channels, inputs // groups.size))
    assert 1 <= multipliers.min() <= multipliers.max() <= groups.largest
    assert -8 <= rounded.integers.min() <= rounded.integers.max() <= 7
    products = rounded.products
    assert products.dtype == np.int8
    assert np.array_equal(products, rounded.integers.astype(int) * np.repeat(multipliers, groups.size, 1))
    low, high = LIMITS[groups.largest]
    assert low <= products.min() <= products.max() <= high
    assert rounded.scale.dtype == np.float32
    assert (rounded.scale > 0).all()
    assert np.array_equal(rounded.dequantize(), products.astype(np.float32) * rounded.scale[:, None])


@pytest.mark.parametrize("rounding", [NearestRounding(), GptqRounding(), GptaqRounding()])
@given(seed=st.integers(0, 10_000), groups=GROUPS, spread=st.sampled_from([0.0, 0.5, 2.0]))
@settings(max_examples=15, deadline=None)
def test_products_lie_on_the_channels_int8_grid(
    rounding: LayerRounding, seed: int, groups: InputGroups, spread: float
) -> None:
    weight = _weight(seed, 7, 64, spread)
    rounded = rounding.round(weight, 4, _moments(seed, 64) if rounding.uses_data else None, groups)
    _check(rounded, groups)
    assert np.isfinite(rounded.dequantize()).all()


@given(st.integers(0, 10_000), GROUPS, st.sampled_from([0.0, 0.5, 2.0]), st.sampled_from([1e-42, 1e-37, 1.0, 1e12]))
@settings(max_examples=40, deadline=None)
def test_groups_are_never_worse_than_one_scale_a_channel(
    seed: int, groups: InputGroups, spread: float, size: float
) -> None:
    weight = (_weight(seed, 9, 64, spread).astype(np.float64) * size).astype(np.float32)
    grouped, single = (NearestRounding().round(weight, 4, groups=own) for own in (groups, None))
    _check(grouped, groups)
    if size < 1e-30:  # too small for a grid of normal float32 numbers: zeros, and no error that counts
        return

    def error(rounded: QuantizedWeight) -> np.ndarray:
        return np.square((rounded.dequantize().astype(np.float64) - weight) / size).sum(1)

    assert (error(grouped) <= error(single) * (1 + 1e-5)).all()


def test_groups_win_where_groups_differ() -> None:
    weight = np.random.default_rng(0).standard_normal((32, 256)).astype(np.float32)
    errors = [
        float(np.square(NearestRounding().round(weight, 4, groups=groups).dequantize() - weight).mean())
        for groups in (InputGroups(16, 15), InputGroups(32, 15), InputGroups(128, 15), None)
    ]
    assert errors == sorted(errors)
    assert errors[1] < 0.8 * errors[3]


@given(st.integers(0, 10_000), st.sampled_from([8, 15]))
@settings(max_examples=15, deadline=None)
def test_gptq_in_groups_has_less_output_error_than_nearest_in_groups(seed: int, largest: int) -> None:
    rng = np.random.default_rng(seed)
    x = rng.standard_normal((400, 64)) @ rng.standard_normal((64, 64)) / 8
    weight, gram, groups = rng.standard_normal((12, 64)).astype(np.float32), x.T @ x / 400, InputGroups(16, largest)
    learned = GptqRounding(0.01).round(weight, 4, InputMoments(gram, gram), groups)
    nearest = NearestRounding().round(weight, 4, groups=groups)

    def error(rounded: QuantizedWeight) -> float:
        return float(np.square(x @ (rounded.dequantize() - weight).T).mean())

    assert error(learned) < error(nearest)


def test_a_weight_on_a_grid_of_groups_comes_back() -> None:
    rng = np.random.default_rng(0)
    integers = rng.integers(-7, 8, (8, 64)).astype(np.int8)
    integers[:, ::16] = 7
    multipliers = rng.integers(5, 9, (8, 4)).astype(np.uint8)
    multipliers[:, 0] = 8
    made = QuantizedWeight(integers, rng.uniform(0.1, 1, 8).astype(np.float32), 4, multipliers)
    again = NearestRounding().round(made.dequantize(), 4, groups=InputGroups(16, 8))
    assert np.abs(again.dequantize() - made.dequantize()).max() < 0.03 * np.abs(made.dequantize()).max()


def test_multipliers_are_counted() -> None:
    assert stored_bits(4, InputGroups(32, 8)) == 4.125
    assert (stored_bits(4), stored_bits(6), stored_bits(7), stored_bits(8)) == (4, 8, 8, 8)
