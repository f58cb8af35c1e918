"""Graphs that rewrites are tried on, as text and as models, and what it means that one is refused."""

import numpy as np
import onnx_ir as ir
from graphs import parse, snapshot

from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def refuses(rewrite: Rewrite, model: ir.Model, reason: str = "") -> Result:
    """The model stays as it is, to the byte; where a reason is asked for, it is given."""
    before = snapshot(model)
    result = rewrite.apply(model)
    assert result.count == 0
    assert snapshot(model) == before
    assert not reason or any(reason in refusal.reason for refusal in result.refused), result.refused
    return result


# One attention of two heads of width 4; parts of it are replaced by other forms.
ATTENTION = """attention (float[n, 5, 8] x) => (float[n, 5, 8] y) {
    q = MatMul(x, wq)
    k = MatMul(x, wk)
    v = MatMul(x, wv)
    q_heads = Reshape(q, split)
    k_heads = Reshape(k, split)
    v_heads = Reshape(v, split)
    q_turned = Transpose<perm = [0, 2, 1, 3]>(q_heads)
    k_turned = Transpose<perm = [0, 2, 3, 1]>(k_heads)
    v_turned = Transpose<perm = [0, 2, 1, 3]>(v_heads)
    scores = MatMul(q_turned, k_turned)
    [softmax] share = Softmax<axis = -1>(scores)
    mixed = MatMul(share, v_turned)
    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
    joined = Reshape(turned, join)
    y = MatMul(joined, wo)
}"""


def attention(*edits: tuple[str, str], **more: object) -> ir.Model:
    rng = np.random.default_rng(0)
    text = ATTENTION
    for old, new in edits:
        assert old in text
        text = text.replace(old, new)
    weights = {name: rng.standard_normal((8, 8)) * 0.5 for name in ("wq", "wk", "wv", "wo")}
    shapes = {"split": np.array([0, 5, 2, 4]), "join": np.array([0, 5, 8])}
    return parse(text, **{**weights, **shapes, **more})


QUICK_GELU = """mlp (float[n, 8] x) => (float[n, 4] y) {
    [c_fc] p = MatMul(x, first)
    [add] h = Add(bias, p)
    [gate] m = Mul(a, h)
    [sigmoid] s = Sigmoid(m)
    [product] g = Mul(h, s)
    [c_proj] y = MatMul(g, second)
}"""


def quick_gelu(width: int, constant: float | np.ndarray, text: str = QUICK_GELU, **more: object) -> ir.Model:
    rng = np.random.default_rng(0)
    values = {"first": rng.standard_normal((8, width)), "bias": rng.standard_normal(width)}
    return parse(text, a=np.asarray(constant, np.float32), second=rng.standard_normal((width, 4)), **values, **more)


NORM = """norm (float[2, 3, 8, 8] x) => (float[2, 6, 8, 8] y) {
    [conv] u = Conv<pads = [1, 1, 1, 1]>(x, w, c)
    [norm] y = BatchNormalization<epsilon = 0.001>(u, g, b, m, v)
}"""


def norm(text: str = NORM, bias: bool = True) -> tuple[ir.Model, np.ndarray]:
    rng = np.random.default_rng(1)
    known = {"w": rng.standard_normal((6, 3, 3, 3)), "g": rng.uniform(0.5, 2, 6), "b": rng.standard_normal(6)}
    known |= {"m": rng.standard_normal(6), "v": rng.uniform(0.1, 2, 6), "c": rng.standard_normal(6)}
    if not bias:
        text = text.replace("(x, w, c)", "(x, w)")
        del known["c"]
    return parse(text, **known), rng.standard_normal((2, 3, 8, 8)).astype(np.float32)
