"""What errors of layers do to the embedding, and rounding by it."""

from pathlib import Path

import numpy as np
from encoders import config_of
from graphs import Feeds, parse
from hypothesis import given, settings
from hypothesis import strategies as st

from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import save_model
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.quantization.inside.output_moments import output_moments
from d4c_onnx.quantization.rounding.base import InputMoments, WeightGrid
from d4c_onnx.quantization.rounding.gptq import GptaqRounding
from d4c_onnx.quantization.rounding.yaqa import YaqaRounding

TWO = "g (float[n,3,8] x) => (float[n,3,6] y) { [first] h = MatMul(x, first_w) [second] y = MatMul(h, second_w) }"
STRANGE = "g (float[n,8] x) => (float[n,16] y) { h = MatMul(x, first_w) s = Sinh(h) y = MatMul(s, second_w) }"


def feeds_of(values: np.ndarray, batch: int = 64) -> Feeds:
    return Feeds(values[start : start + batch] for start in range(0, len(values), batch))


def test_moments_of_a_linear_encoder() -> None:
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((8, 5)), rng.standard_normal((5, 6))
    model = parse(TWO, first_w=first, second_w=second)
    found = output_moments(model, weighted_layers(model.graph), feeds_of(np.zeros((1024, 3, 8), np.float32)))
    assert not found.refused
    [[last]], [[middle]] = [found.by_node["second"]], [found.by_node["first"]]
    rows = 3 * 1024
    np.testing.assert_allclose(last / rows, np.eye(6), atol=0.1)  # the embedding itself: all directions alike
    expected = second @ second.T
    np.testing.assert_allclose(middle / rows, expected, atol=0.1 * np.abs(expected).max())


def test_of_many_rows_some_are_drawn_and_the_mean_stays() -> None:
    """400 rows a sample, of which one weighs as much as a hundred others, and 200 nothing."""
    rng = np.random.default_rng(0)
    first, second = rng.standard_normal((8, 5)), rng.standard_normal((5, 6))
    weights = np.concatenate([[10.0], np.ones(199), np.zeros(200)])[:, None]
    nodes = "[first] h = MatMul(x, a) [second] z = MatMul(h, b) y = Mul(z, w)"
    text = f"g (float[n,400,8] x) => (float[n,400,6] y) {{ {nodes} }}"
    model = parse(text, a=first, b=second, w=weights)
    found = output_moments(model, weighted_layers(model.graph), feeds_of(np.zeros((512, 400, 8), np.float32), 8))
    [[last]], [[middle]] = [found.by_node["second"]], [found.by_node["first"]]
    whole = 512 * np.square(weights).sum()
    np.testing.assert_allclose(last / whole, np.eye(6), atol=0.1)
    expected = second @ second.T
    np.testing.assert_allclose(middle / whole, expected, atol=0.1 * np.abs(expected).max())


def test_a_layer_that_reaches_no_embedding_has_none() -> None:
    text = "g (float[n,8] x) => (float[n,6] y) { [used] y = MatMul(x, a) [idle] z = MatMul(x, b) }"
    model = parse(text, a=np.ones((8, 6)), b=np.ones((8, 6)))
    found = output_moments(model, weighted_layers(model.graph), feeds_of(np.ones((8, 8), np.float32)))
    assert set(found.by_node) == {"used"}


def test_convolutions_in_groups_have_blocks_of_their_own() -> None:
    nodes = "[conv] c = Conv<group=2>(x, k) p = GlobalAveragePool(c) y = Reshape(p, s)"
    text = f"g (float[n,4,6,6] x) => (float[n,6] y) {{ {nodes} }}"
    model = parse(text, k=np.random.default_rng(0).standard_normal((6, 2, 3, 3)), s=np.array([0, -1], np.int64))
    found = output_moments(model, weighted_layers(model.graph), feeds_of(np.ones((4, 4, 6, 6), np.float32)))
    assert found.by_node["conv"].shape == (2, 3, 3)


@settings(max_examples=15, deadline=None)
@given(st.integers(0, 2**20), st.sampled_from([4, 8]), st.booleans())
def test_errors_weigh_less_on_the_embedding(seed: int, bits: int, one_block: bool) -> None:
    rng = np.random.default_rng(seed)
    weight = rng.standard_normal((48, 32)).astype(np.float32)
    inputs, outputs = rng.standard_normal((4, 32)), rng.standard_normal((6, 48))
    gram = inputs.T @ inputs + 0.1 * np.eye(32)
    blocks = [outputs.T @ outputs + 0.05 * np.eye(48)]
    if not one_block:
        blocks = [blocks[0][:24, :24], blocks[0][24:, 24:]]
    moments, known = InputMoments(gram, gram), np.array(blocks, np.float32)
    plain = GptaqRounding(0.01).round(weight, WeightGrid(bits), moments)
    aware = YaqaRounding(0.01).round(weight, WeightGrid(bits), moments, known)

    def cost(values: np.ndarray) -> float:
        parts = np.split(weight - values, len(blocks))
        return sum(float(np.trace(h @ part @ gram @ part.T)) for h, part in zip(blocks, parts, strict=True))

    assert cost(aware.dequantize()) < cost(plain.dequantize())
    assert aware.integers.shape == weight.shape


def test_without_moments_it_is_gptaq() -> None:
    rng = np.random.default_rng(0)
    weight, rows = rng.standard_normal((16, 8)).astype(np.float32), rng.standard_normal((40, 8))
    moments = InputMoments(rows.T @ rows, rows.T @ rows)
    known = np.zeros((1, 16, 16), np.float32)  # outputs that nothing reads
    plain = GptaqRounding().round(weight, WeightGrid(4), moments)
    for outputs in (None, known):
        aware = YaqaRounding().round(weight, WeightGrid(4), moments, outputs)
        np.testing.assert_array_equal(aware.integers, plain.integers)
        np.testing.assert_array_equal(aware.scale, plain.scale)


def test_what_has_no_gradient_is_rounded_without_and_says_so(tmp_path: Path) -> None:
    rng = np.random.default_rng(0)
    model = parse(STRANGE, first_w=rng.standard_normal((8, 32)), second_w=rng.standard_normal((32, 16)))
    save_model(model, tmp_path / "float.onnx")
    feeds, written = feeds_of(rng.standard_normal((64, 8)).astype(np.float32)), {}
    for rounding in ("yaqa", "gptaq"):
        path = tmp_path / f"{rounding}.onnx"
        report = quantize_encoder(tmp_path / "float.onnx", path, feeds, config_of("bits=w4a8", f"rounding={rounding}"))
        written[rounding] = path.read_bytes()
        said = [record for record in report.rewrites if "gradients" in record.name]
        if rounding == "yaqa":
            [record] = said
            [refusal] = record.refused
            assert record.count == 0
            assert "Sinh" in refusal.reason
        else:
            assert not said
    assert written["yaqa"] == written["gptaq"]
