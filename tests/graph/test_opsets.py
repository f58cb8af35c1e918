"""The lowest opset that expresses a graph: asked of onnx, reached without a change of any node."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import parse

from d4c_onnx.graph.forms import CAST, NIBBLES
from d4c_onnx.graph.model import opset_of, raise_opset, save_model, to_proto
from d4c_onnx.graph.opsets import LEAST, lower_opset
from d4c_onnx.graph.values import node, set_constant
from d4c_onnx.runtime.session import EncoderSession


def _model(body: str = "y = Relu(x)", opset: int = 21) -> ir.Model:
    """A graph from `x` to `y`, labelled as new as opset and IR go."""
    return parse(f"g (float[2, 4] x) => (float[2, 4] y) {{ {body} }}", opset, axes=[1])


GRAPHS = {
    "LayerNormalization's": ("y = Relu(x)", LEAST, 8),
    "axes as an input": ("y = ReduceMean(x, axes)", 18, 8),
    "an operator of 20": ("y = Gelu(x)", 20, 9),
    "an attribute of 19": ("y = Cast<to = 1, saturate = 1>(x)", 19, 9),
}


@pytest.mark.parametrize("name", GRAPHS)
def test_a_graph_gets_the_lowest_opset_that_knows_its_nodes(name: str) -> None:
    body, opset, ir_version = GRAPHS[name]
    model = _model(body)
    before = [entry.op_type for entry in model.graph]
    assert lower_opset(model) == opset == opset_of(model)
    assert model.ir_version == ir_version
    assert [entry.op_type for entry in model.graph] == before
    feed = np.ones((2, 4), np.float32)
    kept = _model(body)
    one, other = (EncoderSession(to_proto(entry).SerializeToString()).run(feed) for entry in (model, kept))
    np.testing.assert_array_equal(one, other)
    assert lower_opset(model) == opset  # once more changes nothing


def test_types_count() -> None:
    """INT4 came with 21; nibbles are bytes."""
    for form, opset in ((CAST, 21), (NIBBLES, LEAST)):
        model = _model()
        scale = set_constant(model.graph, "scale", np.array(1, np.float32))
        stored = form.store(model.graph, "weight", np.arange(-8, 8, dtype=np.int8).reshape(4, 4))
        real = node("DequantizeLinear", [stored, scale], "real")
        model.graph.append(real)
        assert lower_opset(model) == opset
        assert model.ir_version == (10 if opset == 21 else 8)


def test_a_domain_that_nothing_uses_is_no_longer_named() -> None:
    plain = _model()
    own = _model("y = com.microsoft.QuickGelu<alpha = 1.0>(x)")
    for model, named in ((plain, False), (own, True)):
        lower_opset(model)
        assert ("com.microsoft" in model.graph.opset_imports) == named


def test_weights_stay_where_they_are(tmp_path: Path) -> None:
    model = _model()
    weight = set_constant(model.graph, "weight", np.ones((4, 4), np.float32))
    model.graph.append(node("MatMul", [model.graph.inputs[0], weight], "product"))
    lower_opset(model)
    save_model(model, tmp_path / "m.onnx")
    assert np.array_equal(model.graph.initializers["weight"].const_value.numpy(), np.ones((4, 4), np.float32))


def test_raised_again_it_is_what_it_was() -> None:
    model = _model()
    lower_opset(model)
    raise_opset(model, 21)
    assert (opset_of(model), model.ir_version) == (21, 10)
