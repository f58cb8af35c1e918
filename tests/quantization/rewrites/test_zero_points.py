"""Zero points that are zero are left out where products alone read the weight."""

import numpy as np
import pytest
from graphs import parse, run

from d4c_onnx.graph.values import nodes_by_name
from d4c_onnx.quantization.rewrites.rewrite import Result
from d4c_onnx.quantization.rewrites.zero_points import OMIT_ZERO_POINTS

ZERO_POINTS = """zeros (float[n, 6] x) => (float[n, 4] y) {
    [weight] r = DequantizeLinear<axis = 1>(w, s, z)
    [layer] y = MatMul(x, r)
}"""


@pytest.mark.parametrize(
    ("zero", "edit", "left_out"),
    [
        (np.zeros(4, np.int8), ("", ""), True),
        (np.array([0, 1, 0, 0], np.int8), ("", ""), False),  # not symmetric
        (
            np.zeros(4, np.int8),
            ("y = MatMul(x, r)", "t = Relu(r)\n u = MatMul(x, t)\n v = MatMul(x, r)\n y = Add(u, v)"),
            False,
        ),  # something else than products reads it
    ],
)
def test_zero_points_of_products_are_left_out(zero: np.ndarray, edit: tuple[str, str], left_out: bool) -> None:
    weight = np.random.default_rng(0).integers(-8, 8, (6, 4), np.int8)
    model = parse(ZERO_POINTS.replace(*edit), w=weight, s=np.full(4, 0.1), z=zero)
    x = np.random.default_rng(1).standard_normal((3, 6)).astype(np.float32)
    expected = run(model, x, optimize=False)
    assert OMIT_ZERO_POINTS.apply(model) == Result(int(left_out))
    assert len(nodes_by_name(model.graph)["weight"].inputs) == (2 if left_out else 3)
    assert np.array_equal(run(model, x, optimize=False), expected)
