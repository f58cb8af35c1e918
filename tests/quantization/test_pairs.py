"""Neighbouring 8-bit weights, whose products x86 without VNNI adds in 16 bits: they fit, and use more than 7 bits."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from encoders import material, quantize
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.graph.forms import INT8
from d4c_onnx.graph.layers import channel_axis, channels_first, weight_position
from d4c_onnx.graph.stored import stored_weight
from d4c_onnx.graph.trellis_form import TRELLISES
from d4c_onnx.graph.values import attribute, node
from d4c_onnx.quantization.rounding.base import InputMoments, LayerRounding, WeightGrid
from d4c_onnx.quantization.rounding.gptq import GptqRounding
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.rounding.pairs import fit_pairs, partners_of


def _node(op: str, **attributes: object) -> ir.Node:
    return node(op, [], "y", attributes=attributes)


def _cut(one: np.ndarray, other: np.ndarray) -> np.ndarray:
    """Whether 16 bits are too few for two products with some uint8."""
    positive = np.maximum(one, 0) + np.maximum(other, 0)
    negative = np.minimum(one, 0) + np.minimum(other, 0)
    return (255 * positive > 2**15 - 1) | (255 * negative < -(2**15))


def _any_cut(integers: np.ndarray, partners: np.ndarray) -> bool:
    wide, alone = integers.astype(int), partners == np.arange(len(partners))
    return bool((_cut(wide, wide[:, partners]) & ~alone).any())


def test_neighbours_of_a_product_are_two_by_two() -> None:
    assert partners_of(_node("MatMul"), (5, 3), 1).tolist() == [1, 0, 3, 2, 4]
    assert partners_of(_node("Gemm", transB=1), (3, 4), 0).tolist() == [1, 0, 3, 2]
    assert partners_of(_node("MatMul"), (2, 3, 7), 2).tolist() == [1, 0, 2, 4, 3, 5]  # two matrices of three inputs
    assert partners_of(_node("MatMul"), (2, 7, 3), 1).tolist() == [1, 0, 2, 4, 3, 5]  # from the left


@pytest.mark.parametrize("shape", [(4, 2, 3, 3), (4, 3, 2, 2), (4, 1, 3, 3), (6, 4, 1, 1), (2, 3, 5)])
def test_neighbours_of_a_convolution_are_as_it_sums(shape: tuple[int, ...]) -> None:
    """Over the kernel's places, and over channels at each: written out one by one."""
    channels, places = shape[1], int(np.prod(shape[2:]))
    order = [channel * places + place for place in range(places) for channel in range(channels)]
    expected = list(range(channels * places))
    for one, other in zip(order[::2], order[1::2], strict=False):
        expected[one], expected[other] = other, one
    assert partners_of(_node("Conv", group=1), shape, 0).tolist() == expected


def test_a_depthwise_convolution_has_no_neighbours() -> None:
    assert partners_of(_node("Conv", group=4), (4, 1, 3, 3), 0).tolist() == list(range(9))
    assert partners_of(_node("Conv", group=2), (4, 1, 3, 3), 0).tolist() != list(range(9))  # two outputs a channel


@given(st.integers(0, 10_000), st.integers(2, 9), st.sampled_from([np.int8, np.float32]))
def test_pairs_are_fitted_and_others_left_alone(seed: int, inputs: int, dtype: type) -> None:
    integers = np.random.default_rng(seed).integers(-128, 128, (6, inputs)).astype(dtype)
    partners = partners_of(_node("MatMul"), (inputs, 6), 1)
    before = integers.copy()
    fit_pairs(integers, partners)
    assert not _any_cut(integers, partners)
    fine = ~_cut(before.astype(int), before.astype(int)[:, partners]) | (partners == np.arange(inputs))
    assert np.array_equal(integers[fine], before[fine])
    assert (np.abs(integers.astype(int)) <= np.abs(before.astype(int))).all()
    changed = np.abs(before.astype(int) - integers).sum(1)
    wide = before.astype(int)
    pairs = np.arange(inputs) < partners
    excess = np.maximum(np.abs(wide + wide[:, partners]) - 128, 0)[:, pairs].sum(1)
    assert (changed == excess).all()  # opposite signs never exceed 128


@pytest.mark.parametrize("rounding", [NearestRounding(), GptqRounding()])
@given(seed=st.integers(0, 10_000), spread=st.sampled_from([0.0, 0.7, 2.0]), inputs=st.sampled_from([9, 32, 40]))
@settings(max_examples=15, deadline=None)
def test_no_rounding_leaves_a_pair_that_is_cut(rounding: LayerRounding, seed: int, spread: float, inputs: int) -> None:
    rng = np.random.default_rng(seed)
    weight = (rng.standard_normal((7, inputs)) * np.exp(spread * rng.standard_normal((7, inputs)))).astype(np.float32)
    weight[0, :2] = np.abs(weight).max() * 1.1  # neighbours, and the largest of all
    x = rng.standard_normal((300, inputs)) @ rng.standard_normal((inputs, inputs))
    moments = InputMoments(x.T @ x / 300, x.T @ x / 300) if rounding.uses_data else None
    partners = partners_of(_node("MatMul"), (inputs, 7), 1)
    rounded = rounding.round(weight, WeightGrid(8, partners=partners), moments)
    assert not _any_cut(rounded.integers, partners)


def test_pairs_cost_far_less_than_a_bit() -> None:
    weight = np.random.default_rng(0).standard_normal((64, 384)).astype(np.float32)
    grids = WeightGrid(8), WeightGrid(8, partners=partners_of(_node("MatMul"), (384, 64), 1)), WeightGrid(7)
    free, paired, narrow = (
        float(np.square(NearestRounding().round(weight, grid).dequantize() - weight).mean()) for grid in grids
    )
    assert narrow > 3.5 * free
    assert paired < 0.6 * narrow


@pytest.mark.parametrize(
    ("model", "tower"),
    [
        pytest.param("vit", "image", marks=pytest.mark.slow),
        ("vit", "text"),
        pytest.param("rn", "image", marks=pytest.mark.slow),
    ],
)
@pytest.mark.parametrize(
    "keys",
    [
        ("bits=w8a8", "rounding=nearest"),
        pytest.param(("bits=w8a8", "rounding=gptq"), marks=pytest.mark.slow),
        pytest.param(("bits=w4a8", "rounding=nearest"), marks=pytest.mark.slow),
    ],
)
def test_files_hold_pairs_that_are_not_cut_and_wide_weights(
    model: str, tower: str, keys: tuple[str, ...], tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, model)
    _, made = quantize(bundle.encoders[tower], dataset, tmp_path / "q.onnx", *keys)
    cut, widest = _cut_pairs(made)
    assert cut == 0
    assert widest > 80 or tower == "text"
    if keys == ("bits=w8a8", "rounding=nearest"):
        _, free = quantize(bundle.encoders[tower], dataset, tmp_path / "f.onnx", *keys, "reduce_range=false")
        assert _cut_pairs(free)[0] > 0


def _cut_pairs(made: ir.Model) -> tuple[int, int]:
    """How many pairs of a file's 8-bit weights are cut, and its largest weight."""
    cut = widest = 0
    for product in made.graph:
        stored = stored_weight(product)
        if stored is None or stored.num_bits > 8 or stored.form not in (INT8, *TRELLISES.values()):
            continue
        integers = stored.unpack().astype(int)
        widest = max(widest, np.abs(integers).max())
        if product.op_type == "Conv":
            assert attribute(product, "group", 1) in (1, len(integers))
            lines = integers.transpose(0, 2, 3, 1).reshape(len(integers), -1)  # as it sums
            if integers.shape[1] == 1:  # a pool, or depthwise: summed in 32 bits
                continue
        else:
            axis = channel_axis(product) if weight_position(product) is not None else integers.ndim - 1
            lines = channels_first(integers, axis)
        even = lines.shape[1] // 2 * 2
        cut += int(_cut(lines[:, 0:even:2], lines[:, 1:even:2]).sum())
    return cut, int(widest)
