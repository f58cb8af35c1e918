"""A transpose that leaves the channels last goes behind the product, and onnxruntime can load the float16 graph."""

import numpy as np
import pytest
from graphs import check, ops, parse, run
from rewrite_cases import refuses

from d4c_onnx.quantization.rewrites.float16 import convert_to_float16
from d4c_onnx.quantization.rewrites.transposed_products import MOVE_TRANSPOSES

# As CoCa's attentional pool asks: queries that are repeated for the batch, tokens first; and keys of a computed value.
POOL = """pool (float[n, 3, 8] x) => (float[3, n, 8] y) {
    count = Shape<start = 0, end = 1>(x)
    sizes = Concat<axis = 0>(count, one, one)
    queries = Expand(asked, sizes)
    turned = Transpose<perm = [1, 0, 2]>(queries)
    [q] q = MatMul(turned, wq)
    same = Neg(x)
    tokens = Transpose<perm = [1, 0, 2]>(same)
    [k] k = MatMul(tokens, wk)
    [v] v = MatMul(tokens, wv)
    kv = Mul(k, v)
    y = Add(q, kv)
}"""


def _known(rng: np.random.Generator) -> dict[str, object]:
    weights = {name: rng.standard_normal((8, 8)).astype(np.float32) for name in ("wq", "wk", "wv")}
    return {"one": [1], "asked": rng.standard_normal((1, 3, 8)).astype(np.float32), **weights}


@pytest.mark.parametrize("images", [1, 2, 5])
def test_moved_transposes_keep_the_function(images: int, rng: np.random.Generator) -> None:
    model = parse(POOL, 18, **_known(rng))
    x = rng.standard_normal((images, 3, 8)).astype(np.float32)
    before = run(model, x)
    assert MOVE_TRANSPOSES.apply(model).count == 3
    check(model)
    np.testing.assert_allclose(run(model, x), before, atol=1e-6)
    assert [entry.name for entry in model.graph if entry.op_type == "MatMul"] == ["q", "k", "v"]
    assert MOVE_TRANSPOSES.apply(model).count == 0


def test_onnxruntime_loads_the_float16_graph(rng: np.random.Generator) -> None:
    """Without the rewrite the process is gone: microsoft/onnxruntime#28392."""
    model = parse(POOL, 18, **_known(rng))
    x = rng.standard_normal((2, 3, 8)).astype(np.float32)
    before = run(model, x)
    half = convert_to_float16(model)
    assert MOVE_TRANSPOSES.apply(half).count == 3
    assert ops(half).count("Transpose") == 3
    np.testing.assert_allclose(run(half, x), before, atol=0.2)


@pytest.mark.parametrize(
    ("reason", "line"),
    [
        ("moves the channels", "t = Transpose<perm = [0, 2, 1]>(x)\n y = MatMul(t, w)"),
        ("moves the channels", "t = Transpose(x)\n y = MatMul(t, w)"),
        ("", "t = Transpose<perm = [1, 0, 2]>(x)\n other = Neg(w)\n both = Mul(other, s)\n y = MatMul(t, both)"),
        ("", "t = Transpose<perm = [1, 0, 2]>(x)\n y = Mul(t, s)"),
    ],
)
def test_only_transposes_in_front_of_weights_move(reason: str, line: str) -> None:
    text = f"g (float[4, 4, 4] x, float[4, 4] s) => (float[4, 4, 4] y) {{ {line} }}"
    refuses(MOVE_TRANSPOSES, parse(text, 18, w=np.eye(4)), reason)
