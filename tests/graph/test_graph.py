"""Graph helpers: weighted layers, true bits, channel order, reading and writing, what branches read."""

from pathlib import Path

import numpy as np
import onnx_ir as ir
import pytest
from graphs import check, ops, parse, run, run_all, snapshot
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import channels_back, channels_first, weighted_layers
from d4c_onnx.graph.model import (
    clear_notes,
    drop_unused,
    load_model,
    opset_of,
    raise_opset,
    save_model,
    signature_of,
    weight_bytes,
    with_outputs,
    with_shapes,
)
from d4c_onnx.graph.stored import average_bits, layer_bits
from d4c_onnx.graph.values import constant, node, only_reader, readers, set_constant, take_over, value_named
from d4c_onnx.manifest import TensorInfo
from d4c_onnx.runtime.session import EncoderSession


def test_weighted_layers_of_the_vit(vit_bundle: Bundle) -> None:
    layers = weighted_layers(load_model(vit_bundle.image_encoder).graph)
    # patch convolution, 6 blocks x (q, k, v, out, c_fc, c_proj), projection
    assert len(layers) == 1 + 6 * 6 + 1
    assert [layer.op for layer in layers if layer.first] == ["Conv"]
    assert [layer.node for layer in layers if layer.last] == [layers[-1].node]


def test_text_tower_has_no_first_layer_but_a_last_one(vit_bundle: Bundle) -> None:
    layers = weighted_layers(load_model(vit_bundle.text_encoder).graph)
    assert len(layers) == 3 * 6 + 1
    assert not any(layer.first for layer in layers)
    assert [layer.node for layer in layers if layer.last] == [layers[-1].node]


def test_resnet_layers_and_folded_batch_norm(rn_bundle: Bundle) -> None:
    model = load_model(rn_bundle.image_encoder)
    assert "BatchNormalization" not in ops(model)
    layers = weighted_layers(model.graph)
    assert sum(layer.op == "Conv" for layer in layers) == 3 + 4 * 4
    assert sum(layer.first for layer in layers) == sum(layer.last for layer in layers) == 1
    assert all(len(entry.inputs) == 3 for entry in model.graph if entry.op_type == "Conv")  # the fold's bias


def test_bits_of_a_float_file_are_32(rn_bundle: Bundle) -> None:
    model = load_model(rn_bundle.image_encoder)
    layers = layer_bits(model)
    assert average_bits(layers) == 32
    assert len(layers) == len(weighted_layers(model.graph))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_channel_order_round_trip(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    weight = np.arange(np.prod(shape)).reshape(shape)
    rows = channels_first(weight, axis)
    assert rows.shape[0] == shape[axis]
    for channel in range(shape[axis]):
        assert set(rows[channel]) == set(np.take(weight, channel, axis).ravel())
    assert np.array_equal(channels_back(rows, tuple(shape), axis), weight)


def _two_layers(opset: int = 18) -> ir.Model:
    rng = np.random.default_rng(0)
    text = """two_layers (float[n, 32] x) => (float[n, 32] y) {
        [one] h = MatMul(x, a)
        [two] y = MatMul(h, b)
        [dead] nobody = Relu(h)
    }"""
    return parse(text, opset, a=rng.standard_normal((32, 32)), b=rng.standard_normal((32, 32)))


def _x() -> np.ndarray:
    return np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)


def test_drop_unused_keeps_what_outputs_need() -> None:
    model = _two_layers()
    set_constant(model.graph, "unread", np.zeros(4, np.float32))
    assert drop_unused(model)
    assert [entry.name for entry in model.graph] == ["one", "two"]
    assert set(model.graph.initializers) == {"a", "b"}
    assert not drop_unused(model)


def test_large_weights_go_to_external_data_and_run(tmp_path: Path) -> None:
    model = _two_layers()
    before = snapshot(model)
    save_model(model, tmp_path / "one.onnx")
    expected = EncoderSession(tmp_path / "one.onnx").run(_x())
    save_model(model, tmp_path / "two.onnx", limit_bytes=1000)
    assert (tmp_path / "two.onnx.data").stat().st_size >= 2 * 32 * 32 * 4
    assert np.array_equal(EncoderSession(tmp_path / "two.onnx").run(_x()), expected)
    assert snapshot(model) == before  # writing takes nothing from the model
    read = load_model(tmp_path / "two.onnx")
    assert average_bits(layer_bits(read)) == 32
    assert weight_bytes(read) == weight_bytes(model) == 2 * 32 * 32 * 4


def test_weights_are_replaced_as_they_are_written(tmp_path: Path) -> None:
    model = _two_layers()
    before = snapshot(model)
    other = np.full((32, 32), 2, np.float32)
    for limit in (0, None):
        save_model(model, tmp_path / "m.onnx", limit, {"a": lambda: other})
        written = load_model(tmp_path / "m.onnx").graph
        assert np.array_equal(constant(written.initializers["a"]), other)
        assert np.array_equal(constant(written.initializers["b"]), constant(model.graph.initializers["b"]))
    assert snapshot(model) == before


def test_sessions_of_large_graphs_read_their_weights_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _two_layers()
    expected = EncoderSession.of_model(model).run(_x())
    written: list[Path] = []

    def save(model: ir.Model, path: Path, limit_bytes: int | None = None) -> None:
        written.append(path)
        save_model(model, path, limit_bytes)

    monkeypatch.setattr("d4c_onnx.graph.model.save_model", save)
    assert np.array_equal(EncoderSession.of_model(model).run(_x()), expected)
    assert not written
    monkeypatch.setattr("d4c_onnx.graph.model.weight_bytes", lambda _: 2**32)
    assert np.array_equal(EncoderSession.of_model(model).run(_x()), expected)
    assert len(written) == 1
    assert not written[0].exists()  # and leave nothing behind


def test_outputs_are_given_back() -> None:
    model = _two_layers()
    before = snapshot(model)
    with with_outputs(model, ["h"]) as other:
        assert [value.name for value in other.graph.outputs] == ["h"]
    assert snapshot(model) == before
    with pytest.raises(RuntimeError, match="on the way"), with_outputs(model, ["nobody", "h"]):
        raise RuntimeError("on the way")
    assert snapshot(model) == before
    with with_outputs(model, None) as same:
        assert [value.name for value in same.graph.outputs] == ["y"]


def test_raise_opset_refuses_what_changed_its_meaning() -> None:
    model = _two_layers(18)
    model.ir_version = 8
    for asked, opset, ir_version in ((20, 20, 8), (21, 21, 10), (22, 22, 10), (23, 23, 11), (21, 23, 11)):
        raise_opset(model, asked)
        assert (opset_of(model), model.ir_version) == (opset, ir_version)  # never lowered
    values = value_named(model.graph, "y")
    model.graph.append(node("GridSample", [values, values], "z"))
    with pytest.raises(GraphError, match="GridSample"):
        raise_opset(model, 22)


def test_not_onnx_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a protobuf at all")
    with pytest.raises(GraphError, match=r"x\.onnx"):
        load_model(tmp_path / "x.onnx")
    with pytest.raises(GraphError, match="no such file"):
        load_model(tmp_path / "y.onnx")


@pytest.mark.parametrize(
    "place", ["node", "value", "input", "constant", "note", "detail", "graph", "producer", "key", "metadata"]
)
def test_text_that_is_no_utf8_is_refused_when_read(tmp_path: Path, place: str) -> None:
    """protobuf hands it over as bytes, and fails when the model is written."""
    constant = helper.make_tensor("constant_", TensorProto.FLOAT, [1], [0.5])
    add = helper.make_node("Add", ["input_", "constant_"], ["value_"], "node_", "note_")
    last = helper.make_node("Relu", ["value_"], ["y"], detail_=1)
    given, made = (helper.make_tensor_value_info(name, TensorProto.FLOAT, [1]) for name in ("input_", "y"))
    model = helper.make_model(helper.make_graph([add, last], "graph_", [given], [made], [constant]))
    model.producer_name = "producer_"
    helper.set_model_props(model, {"key_": "metadata_"})
    content = model.SerializeToString()
    (tmp_path / "whole.onnx").write_bytes(content)
    load_model(tmp_path / "whole.onnx")
    (tmp_path / "spoilt.onnx").write_bytes(content.replace(f"{place}_".encode(), f"{place}".encode() + b"\xb6"))
    with pytest.raises(GraphError, match=r"no UTF-8 text|not an ONNX model"):
        load_model(tmp_path / "spoilt.onnx")


def test_signatures_name_free_axes() -> None:
    signature = signature_of(_two_layers())
    assert signature.inputs == (TensorInfo("x", "float32", ("n", 32)),)
    assert signature.outputs == (TensorInfo("y", "float32", ("n", 32)),)
    assert signature.opset == 18


def test_shapes_are_inferred_past_large_weights() -> None:
    """Weights of more than a thousand values stand aside meanwhile, and are in the result all the same."""
    model = _two_layers()
    proto = with_shapes(model)
    noted = {
        entry.name: [dim.dim_param or dim.dim_value for dim in entry.type.tensor_type.shape.dim]
        for entry in proto.graph.value_info
    }
    assert noted["h"] == ["n", 32]
    assert sorted(tensor.name for tensor in proto.graph.initializer) == ["a", "b"]
    assert len(proto.graph.input) == 1


def test_notes_are_cleared_and_metadata_stays(tmp_path: Path) -> None:
    model = _two_layers()
    model.metadata_props["name"] = "two layers"
    for entry in model.graph:
        entry.metadata_props["stack trace"] = "long"
        entry.doc_string = "longer"
        entry.outputs[0].metadata_props["more"] = "notes"
    clear_notes(model)
    assert dict(model.metadata_props) == {"name": "two layers"}
    text = snapshot(model)
    assert not any(word in text for word in (b"stack trace", b"longer", b"notes"))
    assert [value.name for value in model.graph.outputs] == ["y"]
    assert list(model.graph.outputs[0].shape or ()) == ["n", 32]


def test_nodes_without_names_get_some_of_their_own(tmp_path: Path) -> None:
    text = "g (float[n, 4] x) => (float[n, 4] y) { a = Relu(x)\n b = Relu(a)\n c = Neg(b)\n [kept] y = MatMul(c, w) }"
    model = parse(text, w=np.eye(4))
    for entry in model.graph:
        entry.name = "kept" if entry.op_type == "MatMul" else ""
    save_model(model, tmp_path / "unnamed.onnx")
    names = [entry.name for entry in load_model(tmp_path / "unnamed.onnx").graph]
    assert all(names)
    assert len(set(names)) == 4
    assert names[-1] == "kept"


BRANCHES = """branches (float[n, 8] x) => (float[n, 8] y) {
    [product] h = MatMul(x, w)
    [act] r = Relu(h)
    [sum] total = ReduceSum<keepdims = 0>(x)
    [sign] positive = Greater(total, zero)
    [choice] y = If (positive) <
        then_branch = inside () => (float[n, 8] p) { [negate] p = Neg(h) },
        else_branch = outside () => (float[n, 8] q) { [double] q = Add(r, r) }
    >
}"""


def _branches() -> tuple[ir.Model, np.ndarray]:
    rng = np.random.default_rng(0)
    x = np.abs(rng.standard_normal((3, 8))).astype(np.float32)
    return parse(BRANCHES, w=rng.standard_normal((8, 8)), zero=np.float32(0)), x


def test_readers_inside_branches_are_seen() -> None:
    model, x = _branches()
    hidden = value_named(model.graph, "h")
    assert sorted(str(entry.name) for entry in readers(hidden)) == ["act", "negate"]
    assert only_reader(hidden) is None
    assert not drop_unused(model)  # the Relu is needed by one branch alone
    with_zeros = {sign: run(model, sign * x) for sign in (1, -1)}
    products = {sign: run_all(model, sign * x, ["h"])["h"] for sign in (1, -1)}
    np.testing.assert_allclose(with_zeros[1], -products[1], rtol=1e-6)
    np.testing.assert_allclose(with_zeros[-1], 2 * np.maximum(products[-1], 0), rtol=1e-6)


def test_a_value_that_branches_read_is_replaced_there_too() -> None:
    model, x = _branches()
    hidden = value_named(model.graph, "h")
    twice = node("Add", [hidden, hidden], "twice")
    made = hidden.producer()
    assert made is not None
    model.graph.insert_after(made, twice)
    expected = {sign: 2 * run(model, sign * x) for sign in (1, -1)}
    take_over(hidden, twice.outputs[0])
    for position in (0, 1):
        twice.replace_input_with(position, hidden)
    check(model)
    assert twice.outputs[0].name == "h"
    for sign, answers in expected.items():
        np.testing.assert_allclose(run(model, sign * x), answers, rtol=1e-6)


def test_branches_survive_writing_and_copies(tmp_path: Path) -> None:
    model, x = _branches()
    save_model(model, tmp_path / "branches.onnx")
    for other in (model.clone(), load_model(tmp_path / "branches.onnx")):
        for sign in (1, -1):
            np.testing.assert_array_equal(run(other, sign * x), run(model, sign * x))
