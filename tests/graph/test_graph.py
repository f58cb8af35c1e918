"""Graph helpers: weighted layers, true bits, channel order, external data."""

from pathlib import Path

import numpy as np
import onnx
import pytest
from hypothesis import given
from hypothesis import strategies as st
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.bundle import Bundle
from d4c_onnx.errors import GraphError
from d4c_onnx.graph.bits import average_bits, layer_bits
from d4c_onnx.graph.files import load_graph, opset_of, raise_opset, save_graph
from d4c_onnx.graph.index import GraphIndex, drop_unused, opened
from d4c_onnx.graph.layers import channels_back, channels_first, weighted_layers
from d4c_onnx.runtime.session import EncoderSession


def test_weighted_layers_of_the_vit(vit_bundle: Bundle) -> None:
    layers = weighted_layers(load_graph(vit_bundle.image_encoder).graph)
    # patch convolution, 6 blocks x (q, k, v, out, c_fc, c_proj), projection
    assert len(layers) == 1 + 6 * 6 + 1
    assert [layer.op for layer in layers if layer.first] == ["Conv"]
    assert [layer.node for layer in layers if layer.last] == [layers[-1].node]


def test_text_tower_has_no_first_layer_but_a_last_one(vit_bundle: Bundle) -> None:
    layers = weighted_layers(load_graph(vit_bundle.text_encoder).graph)
    assert len(layers) == 3 * 6 + 1
    assert not any(layer.first for layer in layers)
    assert [layer.node for layer in layers if layer.last] == [layers[-1].node]


def test_resnet_layers_and_folded_batch_norm(rn_bundle: Bundle) -> None:
    graph = load_graph(rn_bundle.image_encoder).graph
    assert not [node for node in graph.node if node.op_type == "BatchNormalization"]
    layers = weighted_layers(graph)
    assert sum(layer.op == "Conv" for layer in layers) == 3 + 4 * 4
    assert sum(layer.first for layer in layers) == sum(layer.last for layer in layers) == 1
    assert all(len(node.input) == 3 for node in graph.node if node.op_type == "Conv")  # the fold's bias


def test_bits_of_a_float_file_are_32(rn_bundle: Bundle) -> None:
    layers = layer_bits(load_graph(rn_bundle.image_encoder))
    assert average_bits(layers) == 32
    assert len(layers) == len(weighted_layers(load_graph(rn_bundle.image_encoder).graph))


@given(st.lists(st.integers(1, 4), min_size=2, max_size=4), st.data())
def test_channel_order_round_trip(shape: list[int], data: st.DataObject) -> None:
    axis = data.draw(st.integers(0, len(shape) - 1))
    weight = np.arange(np.prod(shape)).reshape(shape)
    rows = channels_first(weight, axis)
    assert rows.shape[0] == shape[axis]
    for channel in range(shape[axis]):
        assert set(rows[channel]) == set(np.take(weight, channel, axis).ravel())
    assert np.array_equal(channels_back(rows, tuple(shape), axis), weight)


def _two_layers() -> onnx.ModelProto:
    rng = np.random.default_rng(0)
    weights = [numpy_helper.from_array(rng.standard_normal((32, 32)).astype(np.float32), name) for name in "ab"]
    nodes = [
        helper.make_node("MatMul", ["x", "a"], ["h"], name="one"),
        helper.make_node("MatMul", ["h", "b"], ["y"], name="two"),
        helper.make_node("Relu", ["h"], ["dead"], name="dead"),
    ]
    value = [helper.make_tensor_value_info(name, TensorProto.FLOAT, ["n", 32]) for name in "xy"]
    graph = helper.make_graph(nodes, "g", value[:1], value[1:], weights)
    return helper.make_model(graph, opset_imports=[helper.make_opsetid("", 18)], ir_version=8)


def test_drop_unused_keeps_what_outputs_need() -> None:
    model = _two_layers()
    assert drop_unused(model.graph) == 1
    assert [node.name for node in model.graph.node] == ["one", "two"]
    assert len(GraphIndex(model.graph).initializers) == 2


def test_large_weights_go_to_external_data_and_run(tmp_path: Path) -> None:
    model = _two_layers()
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    save_graph(model, tmp_path / "one.onnx")
    expected = EncoderSession(tmp_path / "one.onnx").run(x)
    save_graph(model, tmp_path / "two.onnx", limit_bytes=1000)
    assert (tmp_path / "two.onnx.data").stat().st_size >= 2 * 32 * 32 * 4
    assert np.array_equal(EncoderSession(tmp_path / "two.onnx").run(x), expected)
    assert model.SerializeToString() == _two_layers().SerializeToString()  # writing takes nothing from the model
    assert average_bits(layer_bits(load_graph(tmp_path / "two.onnx"))) == 32


def test_weights_are_replaced_as_they_are_written(tmp_path: Path) -> None:
    model = _two_layers()
    name = model.graph.initializer[0].name
    other = np.full(tuple(model.graph.initializer[0].dims), 2, np.float32)
    for limit in (0, None):
        save_graph(model, tmp_path / "m.onnx", limit, lambda asked: other if asked == name else None)
        written = GraphIndex(load_graph(tmp_path / "m.onnx").graph)
        for tensor in model.graph.initializer:
            expected = other if tensor.name == name else numpy_helper.to_array(tensor)
            assert np.array_equal(written.constant(tensor.name), expected)


def test_sessions_of_large_graphs_read_their_weights_from_a_file(monkeypatch: pytest.MonkeyPatch) -> None:
    model = _two_layers()
    x = np.random.default_rng(1).standard_normal((3, 32)).astype(np.float32)
    expected = EncoderSession.of_model(model).run(x)
    monkeypatch.setattr("d4c_onnx.runtime.session._IN_MEMORY_BYTES", 0)
    assert np.array_equal(EncoderSession.of_model(model).run(x), expected)


def test_opened_gives_the_outputs_back() -> None:
    model = _two_layers()
    before, inner = model.SerializeToString(), model.graph.node[0].output[0]
    with opened(model, [inner]) as other:
        assert [value.name for value in other.graph.output] == [inner]
    assert model.SerializeToString() == before


def test_raise_opset_refuses_what_changed_its_meaning() -> None:
    model = _two_layers()
    for asked, opset, ir_version in (
        (20, 20, 8),
        (21, 21, 10),
        (22, 22, 10),
        (23, 23, 11),
        (21, 23, 11),
    ):  # never lowered
        raise_opset(model, asked)
        assert (opset_of(model), model.ir_version) == (opset, ir_version)
    model.graph.node.append(helper.make_node("GridSample", ["y", "y"], ["z"]))
    with pytest.raises(GraphError, match="GridSample"):
        raise_opset(model, 22)


def test_not_onnx_is_a_clear_error(tmp_path: Path) -> None:
    (tmp_path / "x.onnx").write_bytes(b"not a protobuf at all")
    with pytest.raises(GraphError, match=r"x\.onnx"):
        load_graph(tmp_path / "x.onnx")
    with pytest.raises(GraphError, match="no such file"):
        load_graph(tmp_path / "y.onnx")
