"""Outlier channels: they leave the integer product exactly, and only where that gains."""

import numpy as np
import onnx_ir as ir
from encoders import config_of
from graphs import Feeds, check, ops, parse, run

from d4c_onnx.graph.values import constant
from d4c_onnx.quantization.plan import make_plan
from d4c_onnx.quantization.rewrites.outlier_channels import split_outliers

SECTION = config_of("bits=w8a8")
RNG = np.random.default_rng(0)


def _model() -> ir.Model:
    text = """mlp (float[n, 32] x) => (float[n, 8] y) {
        [act] h = Relu(x)
        [left] a = MatMul(h, w)
        [bias] c = Add(a, b)
        [right] d = MatMul(h, v)
        z = Add(c, d)
        [end] e = MatMul(z, p)
        y = Relu(e)
    }"""
    shapes = {"w": (32, 8), "v": (32, 8), "b": (8,), "p": (8, 8)}
    return parse(text, **{name: RNG.standard_normal(shape) for name, shape in shapes.items()})


def _rows(factor: float) -> np.ndarray:
    rows = RNG.standard_normal((400, 32)).astype(np.float32)
    rows[:, 5] *= factor
    return rows


def test_massive_channels_leave_exactly_and_nothing_else_does() -> None:
    model, rows = _model(), _rows(100)
    before = run(model.clone(), rows)
    plan = make_plan(model.graph, SECTION)
    result, channels = split_outliers(model, plan, Feeds([rows]), SECTION)
    check(model)
    assert channels == {"h": (5,)}
    assert result.count == 2  # both products that read it
    assert ops(model).count("Gather") == 1  # one pick for both
    np.testing.assert_allclose(run(model, rows), before, rtol=1e-5, atol=1e-4)
    for name in ("w", "v"):
        assert not constant(model.graph.initializers[name])[5].any()
    again = make_plan(model.graph, SECTION)
    assert {layer.node for layer in again.layers} == {layer.node for layer in plan.layers}  # the side product is float
    seen = plan.observed("h", rows)
    assert seen is rows  # a plan that knows no outliers leaves everything in


def test_even_channels_stay() -> None:
    model, rows = _model(), _rows(1)
    result, channels = split_outliers(model, make_plan(model.graph, SECTION), Feeds([rows]), SECTION)
    assert (result.count, channels) == (0, {})
