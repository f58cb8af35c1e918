"""A model as one protobuf, written weight by weight: as a message, and as its bytes, it would be there twice more.

A message is its fields one after the other, each with its number, and one that holds messages says their length before.
So what has no weights is serialised by protobuf, split where the weights belong, and they are copied in between: the
file has the bytes that protobuf would have written.
"""

from collections.abc import Mapping
from typing import Any, BinaryIO

import numpy as np
import onnx
import onnx_ir as ir

_GRAPH, _INITIALIZER, _RAW_DATA = 7, 5, 9  # fields of ModelProto, GraphProto and TensorProto


def write_one_file(model: ir.Model, weights: Mapping[str, ir.TensorProtocol], file: BinaryIO) -> None:
    """Write a model.

    Args:
        model: with all its weights.
        weights: those of its initialisers that are copied one by one, by name; not of strings.
        file: where to.
    """
    shell = _without_values(model, weights)
    parts: list[tuple[bytes, Any, bytes]] = []  # of each initialiser: what stands before its values, they, the rest
    for entry in shell.graph.initializer:
        if (value := weights.get(entry.name)) is None:
            parts.append((entry.SerializeToString(), None, b""))
        else:
            before, behind = _split(entry, _RAW_DATA)
            parts.append((before + _tag(_RAW_DATA, value.nbytes), value, behind))
    lengths = [len(before) + (0 if value is None else value.nbytes) + len(behind) for before, value, behind in parts]
    before, behind = _split(shell.graph, _INITIALIZER)
    length = len(before) + len(behind) + sum(len(_tag(_INITIALIZER, one)) + one for one in lengths)
    start, end = _split(shell, _GRAPH)
    file.write(start + _tag(_GRAPH, length) + before)
    for (header, value, footer), one in zip(parts, lengths, strict=True):
        file.write(_tag(_INITIALIZER, one) + header)
        if value is not None:
            value.tofile(file)
        file.write(footer)
    file.write(behind + end)


def _without_values(model: ir.Model, weights: Mapping[str, ir.TensorProtocol]) -> onnx.ModelProto:
    """The model as a message; of the weights, all but the values. The model gets them back."""
    initializers = model.graph.initializers
    try:
        for name, tensor in weights.items():
            initializers[name].const_value = ir.LazyTensor(
                _nothing,
                tensor.dtype,
                ir.Shape(tensor.shape.numpy()),
                name=tensor.name,
                doc_string=tensor.doc_string,
                metadata_props=dict(tensor.metadata_props),
            )
        shell = ir.to_proto(model)
    finally:
        for name, tensor in weights.items():
            initializers[name].const_value = tensor
    for entry in shell.graph.initializer:
        if entry.name in weights:
            entry.ClearField("raw_data")
            held = weights[entry.name]
            if isinstance(held, ir.serde.TensorProtoTensor) and held.raw.HasField("data_location"):
                entry.data_location = held.raw.data_location  # some writers say that it is here
    return shell


def _nothing() -> ir.Tensor:
    return ir.Tensor(np.empty(0, np.uint8))


def _split(message: onnx.ModelProto | onnx.GraphProto | onnx.TensorProto, number: int) -> tuple[bytes, bytes]:
    """A message without one field, as the bytes of the fields of lower numbers and of those of higher ones."""
    parts = []
    for lower in (True, False):
        part = type(message)()
        part.CopyFrom(message)
        for field in message.DESCRIPTOR.fields:
            if field.number == number or (field.number < number) != lower:
                part.ClearField(field.name)
        parts.append(part.SerializeToString())
    return parts[0], parts[1]


def _tag(number: int, length: int) -> bytes:
    """What stands before a field that says its length."""
    written = bytearray([number << 3 | 2])
    while length >= 0x80:
        written.append(length & 0x7F | 0x80)
        length >>= 7
    written.append(length)
    return bytes(written)
