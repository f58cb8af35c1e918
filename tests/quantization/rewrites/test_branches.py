"""Readers inside the branches of an If: what a rewrite changes must not be needed there, or be right there, too."""

from collections.abc import Callable

import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, ops, parse, run
from rewrite_cases import ATTENTION, NORM, QUICK_GELU, attention, quick_gelu, refuses

from d4c_onnx.graph.values import is_op, value_named
from d4c_onnx.quantization.rewrites.batch_norm import FOLD_BATCH_NORMS
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.identity_pools import DROP_IDENTITY_POOLS
from d4c_onnx.quantization.rewrites.patches import UNFOLD_PATCHES
from d4c_onnx.quantization.rewrites.quick_gelu import FOLD_QUICK_GELU
from d4c_onnx.quantization.rewrites.rewrite import Rewrite

CHOICE = """
    total = ReduceSum<keepdims = 0>(x)
    positive = Greater(total, nought)
    chosen = If (positive) <
        then_branch = inside () => (float[a] one) { one = READ },
        else_branch = outside () => (float[a] other) { other = OTHER }
    >
    result = Add(y, chosen)
"""


def _choosing(text: str, read: str, other: str) -> str:
    """A graph's text whose result is its y, and a value that one of two branches reads out of the graph around it."""
    body, brace, _ = text.rpartition("}")
    body = body.replace("] y)", "] result)", 1)
    return f"{body}{CHOICE.replace('READ', read).replace('OTHER', other)}{brace}"


@pytest.mark.parametrize(
    ("rewrite", "make", "count"),
    [
        (
            FOLD_QUICK_GELU,
            lambda: quick_gelu(
                16, 1.702, _choosing(QUICK_GELU, "ReduceMax(h)", "ReduceMax(nought)"), nought=np.float32(0)
            ),
            0,
        ),
        (
            FOLD_QUICK_GELU,
            lambda: quick_gelu(
                16, 1.702, _choosing(QUICK_GELU, "ReduceMax(g)", "ReduceMax(nought)"), nought=np.float32(0)
            ),
            0,
        ),
        (
            FOLD_QUICK_GELU,
            lambda: quick_gelu(
                16, 1.702, _choosing(QUICK_GELU, "ReduceMax(first)", "ReduceMax(y)"), nought=np.float32(0)
            ),
            0,
        ),
        (
            FUSE_ATTENTION,
            lambda: attention(
                (ATTENTION, _choosing(ATTENTION, "ReduceMax(share)", "ReduceMax(mixed)")), nought=np.float32(0)
            ),
            0,
        ),
        (
            FUSE_ATTENTION,
            lambda: attention(
                (ATTENTION, _choosing(ATTENTION, "ReduceMax(joined)", "ReduceMax(v)")), nought=np.float32(0)
            ),
            1,
        ),
    ],
    ids=["hidden", "activation", "weight", "inside an attention", "around an attention"],
)
def test_what_branches_read_stays_right(rewrite: Rewrite, make: Callable[[], ir.Model], count: int) -> None:
    model = make()
    plain = model.clone()
    x = np.abs(np.random.default_rng(3).standard_normal((2, 5, 8))).astype(np.float32)
    if model.graph.inputs[0].shape is not None and len(model.graph.inputs[0].shape) == 2:
        x = x[0]
    if count:
        assert rewrite.apply(model).count == count
    else:
        assert refuses(rewrite, model).refused
    check(model)
    for sign in (1, -1):
        np.testing.assert_allclose(run(model, sign * x), run(plain, sign * x), atol=1e-5)


@pytest.mark.parametrize(
    ("rewrite", "text", "known", "shape"),
    [
        (
            DROP_IDENTITY_POOLS,
            """g (float[1, 2, 4, 4] x) => (float[1, 2, 4, 4] y) {
                p = AveragePool<kernel_shape = [1, 1]>(x)
                y = Relu(p)
            }""",
            {},
            (1, 2, 4, 4),
        ),
        (FOLD_BATCH_NORMS, NORM, {"w": np.ones((6, 3, 3, 3)), **{name: np.ones(6) for name in "gbmvc"}}, (2, 3, 8, 8)),
    ],
    ids=["pools", "batch norm"],
)
def test_values_that_rewrites_replace_are_replaced_in_branches(
    rewrite: Rewrite, text: str, known: dict, shape: tuple[int, ...]
) -> None:
    read = "ReduceMax(p)" if rewrite is DROP_IDENTITY_POOLS else "ReduceMax(y)"
    text = _choosing(text, read, "ReduceMax(x)")
    model = parse(text, **known, nought=np.float32(0))
    plain = model.clone()
    assert rewrite.apply(model).count == 1
    check(model)
    x = np.abs(np.random.default_rng(0).standard_normal(shape)).astype(np.float32)
    for sign in (1, -1):
        np.testing.assert_allclose(run(model, sign * x), run(plain, sign * x), atol=1e-5)


BRANCHED_MIX = ATTENTION.replace(
    "    mixed = MatMul(share, v_turned)\n    turned = Transpose<perm = [0, 2, 1, 3]>(mixed)\n"
    "    joined = Reshape(turned, join)\n",
    """    total = ReduceSum<keepdims = 0>(x)
    positive = Greater(total, nought)
    joined = If (positive) <
        then_branch = inside () => (float[n, 5, 8] one) {
            mixed = MatMul(share, v_turned)
            turned = Transpose<perm = [0, 2, 1, 3]>(mixed)
            one = Reshape(turned, join)
        },
        else_branch = outside () => (float[n, 5, 8] other) { other = Neg(x) }
    >
""",
)


def test_attention_that_goes_on_in_a_branch_is_refused() -> None:
    """The softmax stands outside, and its only reader inside: no operator can stand in for both."""
    model = attention((ATTENTION, BRANCHED_MIX), nought=np.float32(0))
    assert "If" in ops(model)
    plain = model.clone()
    refuses(FUSE_ATTENTION, model)
    x = np.random.default_rng(3).standard_normal((2, 5, 8)).astype(np.float32)
    for sign in (1, -1):
        np.testing.assert_allclose(run(model, sign * x), run(plain, sign * x), atol=1e-5)


def test_patches_that_go_on_in_a_branch_are_refused() -> None:
    text = """vit (float[n, 3, 8, 8] x) => (float[n, p, c] tokens) {
        map = Conv<strides = [4, 4]>(x, w)
        total = ReduceSum<keepdims = 0>(x)
        positive = Greater(total, nought)
        tokens = If (positive) <
            then_branch = inside () => (float[n, p, c] a) {
                flat = Reshape(map, shape)
                a = Transpose<perm = [0, 2, 1]>(flat)
            },
            else_branch = outside () => (float[n, p, c] b) { b = Reshape(x, other) }
        >
    }"""
    known = {"shape": np.array([0, 5, -1]), "other": np.array([0, 4, 48]), "nought": np.float32(0)}
    model = parse(text, w=np.random.default_rng(0).standard_normal((5, 3, 4, 4)), **known)
    refuses(UNFOLD_PATCHES, model)
    assert any(is_op(entry, "If") for entry in model.graph)
    assert value_named(model.graph, "map").producer() is not None
