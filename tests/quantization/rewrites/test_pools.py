"""Average pools: those of single values go, and those between integers become convolutions."""

import numpy as np
import onnx_ir as ir
import pytest
from encoders import inputs
from graphs import check, ops, parse, run
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_cases import refuses

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.model import load_model
from d4c_onnx.quantization.rewrites.identity_pools import DROP_IDENTITY_POOLS
from d4c_onnx.quantization.rewrites.pools import CONVOLVE_POOLS
from d4c_onnx.quantization.rewrites.rewrite import Result


def test_a_pool_of_single_values_is_skipped(rn_bundle: Bundle, rng: np.random.Generator) -> None:
    """The first stage has one; the others average 2 x 2 values and stay."""
    model = load_model(rn_bundle.image_encoder)
    changed = model.clone()
    assert DROP_IDENTITY_POOLS.apply(changed) == Result(1)
    pools = [ops(entry).count("AveragePool") for entry in (model, changed)]
    assert pools[1] == pools[0] - 1 > 0
    batch = inputs(rn_bundle, rng)["image"][1]
    np.testing.assert_allclose(run(changed, batch), run(model, batch), atol=1e-6)


@pytest.mark.parametrize(
    "text",
    [
        "[pool] y = AveragePool<kernel_shape = [1, 1]>(x)",  # the graph's output
        "[pool] p = AveragePool<kernel_shape = [1, 1], pads = [1, 1, 1, 1]>(x)\n y = Relu(p)",
    ],
)
def test_pools_that_make_an_output_or_pad_stay(text: str) -> None:
    refuses(DROP_IDENTITY_POOLS, parse(f"g (float[n, 2, 4, 4] x) => (float[n, 2, a, b] y) {{ {text} }}"), "pads")


POOL = """pool (float[1, 3, 6, 6] x) => (float[1, 4, a, b] out) {
    w_real = DequantizeLinear(w, w_scale, w_zero)
    y = Conv(x, w_real)
    y_q = QuantizeLinear(y, in_scale, in_zero)
    y_d = DequantizeLinear(y_q, in_scale, in_zero)
    [pool] mean = AveragePool<WINDOW>(y_d)
    mean_q = QuantizeLinear(mean, out_scale, out_zero)
    out = DequantizeLinear(mean_q, out_scale, out_zero)
}"""


def _pool(rng: np.random.Generator, window: str, ratio: float = 1.0) -> ir.Model:
    known = {
        "w": rng.integers(-60, 60, (4, 3, 1, 1), np.int8),
        "w_scale": np.float32(0.01),
        "w_zero": np.int8(0),
        "in_scale": np.float32(0.02),
        "in_zero": np.uint8(rng.integers(0, 256)),
        "out_scale": np.float32(0.02 * ratio),
        "out_zero": np.uint8(rng.integers(0, 256)),
    }
    return parse(POOL.replace("WINDOW", window), **known)


@given(st.integers(0, 2**31 - 1), st.floats(0.5, 2), st.sampled_from([(2, 2), (2, 3)]))
@settings(max_examples=15, deadline=None)
def test_convolved_pool_averages(seed: int, ratio: float, kernel: tuple[int, int]) -> None:
    """Against the pool itself, integers with scales of their own on both sides: at most one step apart."""
    rng = np.random.default_rng(seed)
    plain = _pool(rng, f"kernel_shape = {list(kernel)}, strides = {list(kernel)}", ratio)
    changed = plain.clone()
    assert CONVOLVE_POOLS.apply(changed) == Result(1)
    check(changed)
    assert "AveragePool" not in ops(changed)
    batch = rng.standard_normal((1, 3, 6, 6), dtype=np.float32)
    step = np.float32(0.02 * ratio)
    steps = [np.rint(run(model, batch, optimize=False) / step) for model in (plain, changed)]
    assert np.abs(steps[0] - steps[1]).max() <= 1
    assert np.mean(steps[0] != steps[1]) < 0.3  # a quarter of the means of four integers are ties


@pytest.mark.parametrize(
    ("window", "edit", "reason"),
    [
        ("kernel_shape = [2, 2], pads = [1, 1, 1, 1]", ("", ""), "pads"),
        ("kernel_shape = [4, 4], strides = [4, 4], ceil_mode = 1", ("", ""), "pads"),
        ("kernel_shape = [2, 2]", ("(y_d)", "(y)"), "between integers"),
        ("kernel_shape = [2, 2]", ("y = Conv(x, w_real)", "y = Sigmoid(x)"), "channels"),
    ],
)
def test_other_pools_stay(window: str, edit: tuple[str, str], reason: str) -> None:
    text = POOL.replace("WINDOW", window)
    assert edit[0] in text
    known = {"w": np.ones((4, 3, 1, 1), np.int8), "w_scale": np.float32(0.01), "w_zero": np.int8(0)}
    grids = {
        f"{side}_{part}": kind(1)
        for side in ("in", "out")
        for part, kind in (("scale", np.float32), ("zero", np.uint8))
    }
    refuses(CONVOLVE_POOLS, parse(text.replace(*edit), **known, **grids), reason)
