"""Attention as one operator: masks it knows, and forms it does not."""

import numpy as np
import pytest
from encoders import EOT, SOT
from graphs import check, ops, run
from rewrite_cases import attention, refuses

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import array, attribute, constant, name_of, nodes_of, set_constant
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.rewrite import Result, apply_all


def test_causal_masks_are_known_not_given(vit_bundle: Bundle) -> None:
    """All attentions but the last one, whose only query stands at the end token, need no mask."""
    model = load_model(vit_bundle.text_encoder)
    apply_all((COMPUTE_POOLED_ROW, FUSE_ATTENTION), model)
    fused = list(nodes_of(model.graph, "com.microsoft:MultiHeadAttention"))
    assert [attribute(entry, "unidirectional") for entry in fused] == [1] * (len(fused) - 1) + [0]
    assert [len(entry.inputs) for entry in fused] == [3] * (len(fused) - 1) + [6]

    prefix = load_model(vit_bundle.text_encoder)  # the first two tokens see each other: not causal
    [mask] = [
        value
        for name, value in prefix.graph.initializers.items()
        if "mask" in name and (found := array(value)) is not None and found.ndim == 2
    ]
    values = constant(mask).copy()
    values[0, 1] = 0
    set_constant(prefix.graph, name_of(mask), values)
    plain = prefix.clone()
    assert FUSE_ATTENTION.apply(prefix).count == len(fused)
    masks = [attribute(entry, "unidirectional") for entry in nodes_of(prefix.graph, "com.microsoft:MultiHeadAttention")]
    assert not any(masks)
    ids = np.array([[SOT, 320, 321, 322, EOT]], np.int64)
    np.testing.assert_allclose(run(prefix, ids), run(plain, ids), atol=2e-6)


def test_the_attention_of_the_text_is_one() -> None:
    model = attention()
    batch = np.random.default_rng(1).standard_normal((3, 5, 8)).astype(np.float32)
    expected = run(model, batch)
    assert FUSE_ATTENTION.apply(model) == Result(1)
    assert ops(model) == ["MatMul"] * 3 + ["MultiHeadAttention", "MatMul"]
    check(model)
    np.testing.assert_allclose(run(model, batch), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("edits", "constants", "reason"),
    [
        (
            [("scores = MatMul(q_turned, k_turned)", "p = MatMul(q_turned, k_turned)\n scores = Div(p, root)")],
            {"root": np.float32(2)},
            "no product of queries and keys",
        ),
        (
            [
                (
                    "scores = MatMul(q_turned, k_turned)",
                    'scores = Einsum<equation = "bhqd,bhdk->bhqk">(q_turned, k_turned)',
                )
            ],
            {},
            "no product of queries and keys",
        ),
        (
            [("mixed = MatMul(share, v_turned)", 'mixed = Einsum<equation = "bhqk,bhkd->bhqd">(share, v_turned)')],
            {},
            "not read by one product",
        ),
        (
            [("mixed = MatMul(share, v_turned)", "half = Mul(share, two)\n mixed = MatMul(half, v_turned)")],
            {"two": np.float32(2)},
            "not read by one product",
        ),
        (
            [
                (
                    "y = MatMul(joined, wo)",
                    "twice = MatMul(share, v_turned)\n z = MatMul(joined, wo)\n s = ReduceSum(twice)\n y = Add(z, s)",
                )
            ],
            {},
            "not read by one product",
        ),
        (
            [
                (
                    "k_turned = Transpose<perm = [0, 2, 3, 1]>(k_heads)",
                    "k_first = Transpose<perm = [0, 2, 1, 3]>(k_heads)\n"
                    " k_turned = Transpose<perm = [0, 1, 3, 2]>(k_first)",
                )
            ],
            {},
            "not split into heads",
        ),
        (
            [
                ("joined = Reshape(turned, join)", "joined = Reshape(turned, join)\n other = Relu(turned)"),
                ("y = MatMul(joined, wo)", "z = MatMul(joined, wo)\n s = ReduceSum(other)\n y = Add(z, s)"),
            ],
            {},
            "not joined",
        ),
        (
            [
                ("perm = [0, 2, 1, 3]>(q_heads)", "perm = [2, 0, 1, 3]>(q_heads)"),
                ("perm = [0, 2, 3, 1]>(k_heads)", "perm = [2, 0, 3, 1]>(k_heads)"),
                ("perm = [0, 2, 1, 3]>(v_heads)", "perm = [2, 0, 1, 3]>(v_heads)"),
                ("perm = [0, 2, 1, 3]>(mixed)", "perm = [1, 2, 0, 3]>(mixed)"),
            ],
            {},
            "another order of axes",
        ),
        (
            [("scores = MatMul(q_turned, k_turned)", "p = MatMul(q_turned, k_turned)\n scores = Add(p, far)")],
            {"far": np.zeros((2, 5, 5))},
            "the axes of its mask are not known",
        ),
    ],
    ids=["div", "einsum", "einsum of values", "scaled", "two readers", "two turns", "two joins", "order", "mask of 3"],
)
def test_attention_of_another_form_is_refused_with_the_reason(
    edits: list[tuple[str, str]], constants: dict, reason: str
) -> None:
    result = refuses(FUSE_ATTENTION, attention(*edits, **constants), reason)
    assert [refusal.place for refusal in result.refused] == ["softmax"]
