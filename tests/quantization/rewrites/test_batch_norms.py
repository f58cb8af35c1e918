"""Batch norms fold into the convolution before them, where that is theirs alone."""

import numpy as np
import pytest
from graphs import check, ops, run
from rewrite_cases import NORM, norm, refuses

from d4c_onnx.graph.values import name_of
from d4c_onnx.quantization.rewrites.batch_norm import FOLD_BATCH_NORMS
from d4c_onnx.quantization.rewrites.rewrite import Result


@pytest.mark.parametrize("bias", [True, False])
def test_batch_norm_folds_exactly(bias: bool) -> None:
    model, x = norm(bias=bias)
    expected = run(model, x)
    assert FOLD_BATCH_NORMS.apply(model) == Result(1)
    assert ops(model) == ["Conv"]
    assert [name_of(value) for value in model.graph.outputs] == ["y"]
    check(model)
    np.testing.assert_allclose(run(model, x), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("edits", "reason"),
    [
        ([("8] y)", "8] y, float[2, 6, 8, 8] u)")], "something else reads"),  # the convolution's own
        ([("[norm] y", "r = Relu(u)\n [norm] t"), ("m, v)", "m, v)\n y = Add(r, t)")], "something else reads"),
        ([("(u, g", "(r, g"), ("[norm]", "r = Relu(u)\n [norm]")], "not made by a convolution"),
        ([("(u, g, b, m, v)", "(u, g, b, mean, v)"), ("[norm]", "mean = Neg(m)\n [norm]")], "not constants"),
        (
            [("[norm] y", "t = Conv<pads = [1, 1, 1, 1]>(x, w)\n [norm] s"), ("m, v)", "m, v)\n y = Add(s, t)")],
            "a constant of its own",
        ),
    ],
    ids=["output", "reader", "relu between", "computed statistics", "shared weight"],
)
def test_batch_norms_that_do_not_fold_stay(edits: list[tuple[str, str]], reason: str) -> None:
    text = NORM
    for edit in edits:
        assert edit[0] in text
        text = text.replace(*edit)
    refuses(FOLD_BATCH_NORMS, norm(text)[0], reason)
