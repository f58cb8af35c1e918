"""A residual and the LayerNorm behind it are one operator, where shapes are known and equal."""

import numpy as np
import onnx_ir as ir
import pytest
from encoders import inputs, material
from graphs import check, ops, parse, run
from rewrite_cases import refuses

from d4c_onnx.graph.model import clear_notes, load_model, model_of, with_shapes
from d4c_onnx.quantization.rewrites.residuals import FUSE_RESIDUALS
from d4c_onnx.runtime.session import EncoderSession


def _noted(model: ir.Model) -> ir.Model:
    """With the shapes of all values, as a float16 graph comes from its converter."""
    return model_of(with_shapes(model))


@pytest.mark.parametrize(("model", "tower", "sums"), [("vit", "image", 12), ("vit", "text", 5), ("rn", "text", 5)])
def test_fused_residuals_keep_the_function(
    model: str, tower: str, sums: int, request: pytest.FixtureRequest, rng: np.random.Generator
) -> None:
    bundle, _ = material(request, model)
    changed = _noted(load_model(bundle.encoders[tower]))
    before = ops(changed).count("LayerNormalization")
    assert FUSE_RESIDUALS.apply(changed).count == sums
    assert ops(changed).count("LayerNormalization") == before - sums
    clear_notes(changed)
    check(changed)
    for batch in inputs(bundle, rng)[tower]:
        exact = EncoderSession(bundle.encoders[tower]).run(batch)
        np.testing.assert_allclose(run(changed, batch), exact, atol=2e-6)
    assert FUSE_RESIDUALS.apply(changed).count == 0


PRODUCT = "product = MatMul(x, weight)"


@pytest.mark.parametrize(
    ("reason", "shape", "lines"),
    [
        ("", "n, 3, 8", f"x2 = Neg(x)\n {PRODUCT}\n y2 = Add(bias, product)\n sum = Add(x2, y2)"),
        ("", "n, 3, 8", f"x2 = Neg(x)\n {PRODUCT}\n sum = Add(product, x2)"),
        # no residual: a bias alone
        ("one shape", "n, 3, 8", f"{PRODUCT}\n sum = Add(product, bias)"),
        # position added to tokens, a row for all of the batch, four axes: onnxruntime's operator takes none of them
        ("one shape", "n, 3, 8", f"{PRODUCT}\n rows = Neg(position)\n sum = Add(product, rows)"),
        ("one shape", "n, 3, 8", "x2 = Neg(x)\n product = MatMul(row, weight)\n sum = Add(x2, product)"),
        ("one shape", "n, 3, 3, 8", f"x2 = Neg(x)\n {PRODUCT}\n sum = Add(x2, product)"),
        ("no summand is a product", "n, 3, 8", "x2 = Neg(x)\n sum = Add(x2, x)"),
    ],
)
def test_only_residuals_are_fused(reason: str, shape: str, lines: str) -> None:
    text = f"""one (float[{shape}] x) => (float[{shape}] y) {{
        {lines}
        [norm] y = LayerNormalization(sum, scale, bias)
    }}"""
    known = {"weight": np.eye(8), "position": np.ones((3, 8)), "row": np.ones((1, 3, 8)), "scale": np.ones(8)}
    model = _noted(parse(text, **known, bias=np.full(8, 0.5)))
    size = [int(part) if part.isdigit() else 2 for part in shape.split(", ")]
    batch = np.random.default_rng(0).standard_normal(size).astype(np.float32)
    exact = run(model, batch)
    result = FUSE_RESIDUALS.apply(model)
    assert result.count == (not reason)
    assert [reason in refusal.reason for refusal in result.refused] == [True] * bool(reason)
    np.testing.assert_allclose(run(model, batch), exact, atol=1e-6)


def test_sums_of_unknown_shape_are_not_fused() -> None:
    text = f"""one (float[n, 3, 8] x) => (float[n, 3, 8] y) {{
        x2 = Neg(x)\n {PRODUCT}\n sum = Add(product, x2)
        [norm] y = LayerNormalization(sum, scale, bias)
    }}"""
    model = parse(text, weight=np.eye(8), scale=np.ones(8), bias=np.ones(8))
    refuses(FUSE_RESIDUALS, model, "not known to have one shape")
