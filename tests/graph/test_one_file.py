"""A model written weight by weight: protobuf's own bytes, without a second copy of the weights in memory."""

import tracemalloc
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx
import onnx_ir as ir
import pytest

from d4c_onnx.graph.model import load_model, save_model, to_proto

SIZE = 600  # values: more bytes than what stays in the graph, of every type
VALUES = np.random.default_rng(0).integers(-7, 8, SIZE)


def _lazy() -> ir.LazyTensor:
    made = ir.Tensor(VALUES.astype(np.float32))
    return ir.LazyTensor(lambda: made, made.dtype, made.shape, name="weight")


def _of_proto(**fields: object) -> ir.TensorProtocol:
    return ir.from_proto(onnx.TensorProto(dims=[SIZE], data_type=onnx.TensorProto.FLOAT, name="weight", **fields))


TENSORS = {
    "float": lambda: ir.Tensor(VALUES.astype(np.float32)),
    "noted": lambda: ir.Tensor(VALUES.astype(np.float32), doc_string="said", metadata_props={"who": "said it"}),
    "float16": lambda: ir.Tensor(VALUES.astype(np.float16)),
    "bfloat16": lambda: ir.Tensor(VALUES.astype(ml_dtypes.bfloat16)),
    "int64": lambda: ir.Tensor(VALUES),
    "transposed": lambda: ir.Tensor(VALUES.reshape(20, 30).astype(np.float32).T),
    "int4": lambda: ir.Tensor(np.tile(VALUES, 7)[:4199].astype(ml_dtypes.int4), dtype=ir.DataType.INT4),
    "strings": lambda: ir.StringTensor(np.array([b"word"] * SIZE, object), shape=ir.Shape([SIZE])),
    "lazy": _lazy,
    "a message": lambda: _of_proto(raw_data=VALUES.astype(np.float32).tobytes()),
    "a message that lies here": lambda: _of_proto(
        raw_data=VALUES.astype(np.float32).tobytes(), data_location=onnx.TensorProto.DEFAULT
    ),
    "a list of numbers": lambda: _of_proto(float_data=VALUES.tolist()),
}


def _model(tensor: ir.TensorProtocol) -> ir.Model:
    """The tensor between small ones, and something before and behind in every message."""
    values = {
        name: ir.Value(name=name, const_value=one, type=ir.TensorType(one.dtype), shape=ir.Shape(one.shape.numpy()))
        for name, one in {
            "before": ir.Tensor(np.arange(3, dtype=np.float32), name="before"),
            "weight": tensor,
            "behind": ir.Tensor(np.zeros((), np.int64), name="behind"),
        }.items()
    }
    tensor.name = "weight"
    node = ir.node("Identity", [values["weight"]])
    node.outputs[0].name = "output"
    node.outputs[0].type = ir.TensorType(tensor.dtype)
    graph = ir.Graph(
        [], node.outputs, nodes=[node], initializers=list(values.values()), opset_imports={"": 21}, name="graph"
    )
    graph.doc_string = "a graph"
    model = ir.Model(graph, ir_version=10, producer_name="test", doc_string="a model")
    model.metadata_props["key"] = "value"
    return model


@pytest.mark.parametrize("kind", TENSORS)
def test_the_bytes_are_those_of_protobuf(tmp_path: Path, kind: str) -> None:
    model = _model(TENSORS[kind]())
    held = model.graph.initializers["weight"].const_value
    save_model(model, tmp_path / "model.onnx")
    written = (tmp_path / "model.onnx").read_bytes()
    assert model.graph.initializers["weight"].const_value is held
    for value in model.graph.initializers.values():  # the file does not note them once more
        value.type = value.shape = None
    assert written == to_proto(model).SerializeToString()
    read = load_model(tmp_path / "model.onnx").graph.initializers["weight"].const_value
    assert read is not None
    assert np.array_equal(read.numpy(), held.numpy())


def test_weights_are_not_copied_as_a_whole(tmp_path: Path) -> None:
    """From beside the graph into one file."""
    size = 2**24
    save_model(_model(ir.Tensor(np.ones(size, np.uint8))), tmp_path / "beside.onnx", limit_bytes=0)
    model = load_model(tmp_path / "beside.onnx")
    tracemalloc.start()
    try:
        save_model(model, tmp_path / "model.onnx")
        _, peak = tracemalloc.get_traced_memory()
    finally:
        tracemalloc.stop()
    assert (tmp_path / "model.onnx").stat().st_size > size
    assert not (tmp_path / "model.onnx.data").exists()
    assert peak < size / 4


def test_small_weights_beside_the_graph_come_into_the_one_file(tmp_path: Path) -> None:
    """As onnx_ir's own writer, and torch's exporter, put them there: from 256 bytes on."""
    ir.save(_model(ir.Tensor(np.arange(100, dtype=np.float32))), tmp_path / "beside.onnx", external_data="w.data")
    model = load_model(tmp_path / "beside.onnx")
    assert isinstance(model.graph.initializers["weight"].const_value, ir.ExternalTensor)
    (tmp_path / "to").mkdir()
    save_model(model, tmp_path / "to" / "model.onnx")
    written = onnx.load(tmp_path / "to" / "model.onnx")
    assert not any(entry.external_data for entry in written.graph.initializer)
    read = load_model(tmp_path / "to" / "model.onnx").graph.initializers["weight"].const_value
    assert read is not None
    assert np.array_equal(read.numpy(), np.arange(100, dtype=np.float32))
