"""Quantised products of one value become one product, exactly."""

import numpy as np
import onnx
import onnxruntime as ort
from hypothesis import given, settings
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.quantization.deployment import fuse_qkv


def _fan(seed: int, widths: list[int], shared: bool) -> onnx.ModelProto:
    """Quantised products of one value; of the first's weight a second reader, where it is `shared`."""
    rng = np.random.default_rng(seed)
    arrays = {"scale": np.float32(0.03), "zero": np.uint8(rng.integers(0, 256))}
    nodes = [
        helper.make_node("QuantizeLinear", ["x", "scale", "zero"], ["q"], "q"),
        helper.make_node("DequantizeLinear", ["q", "scale", "zero"], ["d"], "d"),
    ]
    for number, width in enumerate(widths):
        arrays[f"w{number}"] = rng.integers(-8, 8, (6, width), np.int8)
        arrays[f"s{number}"] = rng.uniform(0.01, 0.1, width).astype(np.float32)
        nodes.append(helper.make_node("DequantizeLinear", [f"w{number}", f"s{number}"], [f"r{number}"], axis=1))
        nodes.append(helper.make_node("MatMul", ["d", f"r{number}"], [f"y{number}"], f"product{number}"))
    shapes = {f"y{number}": ["batch", width] for number, width in enumerate(widths)}
    if shared:
        nodes.append(helper.make_node("DequantizeLinear", ["w0", "s0"], ["again"], axis=1))
        shapes["again"] = [6, widths[0]]
    graph = helper.make_graph(
        nodes,
        "fan",
        [helper.make_tensor_value_info("x", TensorProto.FLOAT, ["batch", 6])],
        [helper.make_tensor_value_info(name, TensorProto.FLOAT, shape) for name, shape in shapes.items()],
        [numpy_helper.from_array(np.asarray(array), name) for name, array in arrays.items()],
    )
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 21)], ir_version=10)


@given(st.integers(0, 2**31 - 1), st.lists(st.integers(1, 9), min_size=1, max_size=4), st.data(), st.booleans())
@settings(max_examples=25, deadline=None)
def test_products_of_one_value_are_joined_exactly(
    seed: int, widths: list[int], data: st.DataObject, shared: bool
) -> None:
    """Narrow weights with narrow ones only, and none that is needed elsewhere, too."""
    apart, joined = _fan(seed, widths, shared), _fan(seed, widths, shared)
    names = [f"w{number}" for number in range(len(widths))]
    narrow = {name for name in names if data.draw(st.booleans())}
    gone = fuse_qkv(joined, narrow)
    onnx.checker.check_model(joined)
    own = set(names) - ({"w0"} if shared else set())
    groups = [own & narrow, own - narrow]
    assert set(gone) == {name for group in groups if len(group) > 1 for name in group}
    assert all(len({gone[name] for name in group}) == 1 for group in groups if len(group) > 1)
    x = np.random.default_rng(seed).standard_normal((3, 6)).astype(np.float32)
    one, other = (
        ort.InferenceSession(model.SerializeToString(), providers=["CPUExecutionProvider"]).run(None, {"x": x})
        for model in (apart, joined)
    )
    for before, after in zip(one, other, strict=True):
        np.testing.assert_array_equal(after, before)
