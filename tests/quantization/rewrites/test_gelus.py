"""GELU apart from its bias, and QuickGELU without its constant."""

import numpy as np
import pytest
from encoders import inputs
from graphs import check, ops, parse, run, served
from hypothesis import given, settings
from hypothesis import strategies as st
from rewrite_cases import QUICK_GELU, quick_gelu, refuses

from d4c_onnx.bundle import Bundle
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import attribute
from d4c_onnx.quantization.rewrites.gelu import SEPARATE_GELU
from d4c_onnx.quantization.rewrites.mappings import apply_scale, find_mappings
from d4c_onnx.quantization.rewrites.quick_gelu import FOLD_QUICK_GELU
from d4c_onnx.quantization.rewrites.rewrite import Result
from d4c_onnx.runtime.session import EncoderSession


@pytest.mark.parametrize("axes", [2, 3])
def test_gelu_stays_apart_from_its_bias(axes: int) -> None:
    rng = np.random.default_rng(0)
    free = ", ".join(["batch", "tokens"][: axes - 1])
    text = f"""mlp (float[{free}, 8] x) => (float[{free}, 16] y) {{
        [product] p = MatMul(x, weight)
        [add] h = Add(p, bias)
        [gelu] g = Gelu(h)
        [other] y = Add(g, bias)
    }}"""  # the second reader keeps the bias as it was
    model = parse(text, weight=rng.standard_normal((8, 16)), bias=rng.standard_normal(16))
    x = rng.standard_normal((2, 3, 8)[3 - axes :]).astype(np.float32)
    expected = run(model, x)
    assert ("BiasGelu" in ops(served(model))) == (axes == 3)  # or it has no point any more; two axes are a Gemm
    assert SEPARATE_GELU.apply(model) == Result(1)
    check(model)
    assert "Gelu" in ops(served(model))
    assert "BiasGelu" not in ops(served(model))
    np.testing.assert_allclose(run(model, x), expected, atol=1e-6)
    assert SEPARATE_GELU.apply(model) == Result(0)
    by_tanh = parse(text.replace("Gelu(h)", 'Gelu<approximate = "tanh">(h)'), weight=np.ones((8, 16)), bias=np.ones(16))
    refuses(SEPARATE_GELU, by_tanh, "by tanh")


@pytest.mark.parametrize("tower", ["image", "text"])
def test_quick_gelu_loses_its_constant_exactly(tower: str, vit_bundle: Bundle, rng: np.random.Generator) -> None:
    model = load_model(vit_bundle.encoders[tower])
    blocks, muls = ops(model).count("Sigmoid"), ops(model).count("Mul")
    assert FOLD_QUICK_GELU.apply(model) == Result(blocks)
    assert blocks > 0
    check(model)
    assert ops(model).count("Mul") == muls - blocks
    assert FOLD_QUICK_GELU.apply(model) == Result(0)
    gelus = [entry for entry in served(model).graph if entry.op_type == "QuickGelu"]
    assert [attribute(entry, "alpha") for entry in gelus] == [1.0] * blocks
    for batch in inputs(vit_bundle, rng)[tower]:
        np.testing.assert_allclose(run(model, batch), EncoderSession(vit_bundle.encoders[tower]).run(batch), atol=2e-6)


@given(st.floats(0.05, 20), st.integers(1, 40))
@settings(max_examples=20, deadline=None)
def test_any_positive_constant_folds(constant: float, width: int) -> None:
    model = quick_gelu(width, constant)
    x = np.random.default_rng(width).standard_normal((5, 8)).astype(np.float32)
    expected = run(model, x)
    assert FOLD_QUICK_GELU.apply(model) == Result(1)
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)
    [mapping] = find_mappings(model.graph, weighted_layers(model.graph))
    assert mapping.kind == "activation"  # smoothing can still reach it, at the price of a Mul
    apply_scale(model.graph, mapping, np.random.default_rng(0).uniform(0.1, 10, width).astype(np.float32))
    np.testing.assert_allclose(run(model, x), expected, rtol=1e-4, atol=1e-4)


@pytest.mark.parametrize(
    ("constant", "edit", "reason"),
    [
        (np.linspace(1, 2, 16), ("", ""), "one positive number"),  # a stress variant's
        (-1.702, ("", ""), "one positive number"),
        (1.702, ("float[n, 4] y)", "float[n, 4] y, float[n, 16] h)"), "two linear layers"),  # would get 1.702 h
        (1.702, ("y = MatMul(g, second)", "y = MatMul(g, second)\n unread = MatMul(g, second)"), "two linear layers"),
    ],
    ids=["vector", "negative", "an output", "shared weight"],
)
def test_constants_that_do_not_fold_stay(constant: object, edit: tuple[str, str], reason: str) -> None:
    refuses(FOLD_QUICK_GELU, quick_gelu(16, constant, QUICK_GELU.replace(*edit)), reason)  # type: ignore[arg-type]
