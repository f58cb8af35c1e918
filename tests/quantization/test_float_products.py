"""Weights whose products stay in float: how they lie in a file."""

import numpy as np
import pytest
from graphs import check, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.graph.stored import layer_bits, stored_weight
from d4c_onnx.graph.values import nodes_of
from d4c_onnx.quantization.storage import store_blocks, store_float16

MATMUL = "g (float[n, {0}] x) => (float[n, {1}] y) {{ y = MatMul(x, w) }}"
GEMM = "g (float[n, {0}] x) => (float[n, {1}] y) {{ y = Gemm<transB = 1>(x, w) }}"


@given(st.sampled_from([MATMUL, GEMM]), st.integers(1, 4), st.integers(1, 3), st.integers(0, 99))
@settings(max_examples=25, deadline=None)
def test_blocks_keep_a_projection_close(text: str, parts: int, outputs: int, seed: int) -> None:
    inputs, channels = 16 * parts, 4 * outputs
    rng = np.random.default_rng(seed)
    real = (rng.standard_normal((inputs, channels)) * rng.uniform(0.01, 10, channels)).astype(np.float32)
    model = parse(text.format(inputs, channels), w=real if text is MATMUL else np.ascontiguousarray(real.T))
    store_blocks(model, ["w"])
    check(model)
    x = rng.standard_normal((3, inputs), np.float32)
    [layer] = layer_bits(model)
    assert layer.shape == (real.shape if text is MATMUL else real.T.shape)
    assert layer.bits == 8.5
    largest = np.abs(real).max()
    for optimize in (False, True):
        assert np.abs(run(model, x, optimize=optimize) - x @ real).max() < 0.06 * largest * np.sqrt(inputs)
    stored = sum(value.const_value.nbytes for value in model.graph.initializers.values() if value.name != "w_shape")
    assert stored == real.size * 8.5 / 8


@pytest.mark.parametrize(("width", "bits"), [(5, 16), (8, 8.5)])
def test_what_falls_into_no_blocks_has_16_bits(width: int, bits: float) -> None:
    real = np.random.default_rng(0).standard_normal((16, width)).astype(np.float32)
    model = parse(MATMUL.format(16, width), w=real)
    store_blocks(model, ["w"])
    assert [layer.bits for layer in layer_bits(model)] == [bits]
    assert np.abs(run(model, np.eye(16, dtype=np.float32)) - real).max() < 0.02


def test_what_float16_cannot_hold_stays() -> None:
    model = parse(MATMUL.format(16, 4), w=np.full((16, 4), 1e6, np.float32))
    store_float16(model, ["w", "nowhere"])
    [product] = nodes_of(model.graph, "MatMul")
    stored = stored_weight(product)
    assert stored is not None
    assert stored.num_bits == 32
