"""Reading and writing ONNX files, with external data where one protobuf cannot hold the weights."""

import contextlib
import io
from collections.abc import Callable, Iterable, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx
from onnx import numpy_helper

from d4c_onnx.errors import GraphError

PROTOBUF_LIMIT_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the margin is for the graph around the weights
EXTERNAL_SUFFIX = ".data"
_EXTERNAL_FROM_BYTES = 1024  # smaller constants stay in the graph, where shape inference looks for them
_ALIGN_BYTES = 4096  # a page: what is read in place starts on one
# Operators whose meaning (not only whose types) changed between opset 17 and 23.
_CHANGED = {"GridSample", "GroupNormalization", "DFT"}
_IR_VERSIONS = ((23, 11), (21, 10), (0, 8))  # from which opset on, which IR version


def load_graph(path: Path) -> onnx.ModelProto:
    """Read a model with its external data.

    Raises:
        GraphError: the file is not an ONNX model.
    """
    try:
        return onnx.load(path)
    except FileNotFoundError as error:
        raise GraphError(f"{path}: no such file.") from error
    except Exception as error:  # protobuf's DecodeError has no stable public name
        raise GraphError(f"{path}: not an ONNX model ({str(error)[:200]}).") from error


def weight_bytes(model: onnx.ModelProto, shared: Iterable[onnx.TensorProto] = ()) -> int:
    """What a model's initialisers take, and those of others that it shares."""
    return sum(len(tensor.raw_data) for tensor in (*model.graph.initializer, *shared))


def save_graph(
    model: onnx.ModelProto,
    path: Path,
    limit_bytes: int | None = None,
    replaced: Callable[[str], np.ndarray | None] = lambda _: None,
    shared: Sequence[onnx.TensorProto] = (),
) -> None:
    """Write a model to a staged path; weights go to `<path>.data` when one file cannot hold them.

    The model itself stays as it is, and weights are written one by one: no second copy of them is made in memory.

    Args:
        limit_bytes: how many bytes of weights one file may hold; none: as many as a protobuf can.
        replaced: other values for an initialiser of that name, of its own shape and type; None leaves it.
        shared: initialisers of other models, which the file shall have, too.
    """
    shell = without_weights(model)
    beside = weight_bytes(model, shared) > (PROTOBUF_LIMIT_BYTES if limit_bytes is None else limit_bytes)
    with contextlib.ExitStack() as stack:
        data = stack.enter_context(path.with_name(path.name + EXTERNAL_SUFFIX).open("wb")) if beside else None
        for tensor in (*model.graph.initializer, *shared):
            other = replaced(tensor.name)
            written = shell.graph.initializer.add()
            if data is None or len(tensor.raw_data) < _EXTERNAL_FROM_BYTES:
                written.CopyFrom(tensor if other is None else numpy_helper.from_array(other, tensor.name))
                continue
            data.seek(-data.tell() % _ALIGN_BYTES, io.SEEK_CUR)
            raw = tensor.raw_data if other is None else np.ascontiguousarray(other).tobytes()
            written.name, written.data_type = tensor.name, tensor.data_type
            written.dims.extend(tensor.dims)
            written.data_location = onnx.TensorProto.EXTERNAL
            place = {"location": path.name + EXTERNAL_SUFFIX, "offset": data.tell(), "length": len(raw)}
            for key, value in place.items():
                written.external_data.add(key=key, value=str(value))
            data.write(raw)
    path.write_bytes(shell.SerializeToString())


def without_weights(model: onnx.ModelProto) -> onnx.ModelProto:
    """A copy of everything but the initialisers, which are most of what a model takes in memory."""
    shell = onnx.ModelProto()
    for field, value in model.ListFields():
        if field.name != "graph":
            _copy_field(shell, field.name, value)
    for field, value in model.graph.ListFields():
        if field.name != "initializer":
            _copy_field(shell.graph, field.name, value)
    return shell


def _copy_field(target: Any, name: str, value: Any) -> None:
    """One field of a protobuf message: a message, a scalar, or a repeated one of either."""
    if hasattr(value, "CopyFrom"):
        getattr(target, name).CopyFrom(value)
    elif isinstance(value, (int, float, str, bytes)):
        setattr(target, name, value)
    else:
        getattr(target, name).extend(value)


def raise_opset(model: onnx.ModelProto, version: int) -> None:
    """Relabel the default domain's opset, in place. Our operators only gained types between 17 and 23.

    Raises:
        GraphError: the graph holds an operator whose meaning changed on the way.
    """
    changed = sorted({node.op_type for node in model.graph.node} & _CHANGED)
    if changed:
        raise GraphError(f"cannot raise the opset to {version}: {', '.join(changed)} changed its meaning on the way.")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < version:
            entry.version = version
    model.ir_version = max(model.ir_version, next(ir for since, ir in _IR_VERSIONS if version >= since))


def opset_of(model: onnx.ModelProto) -> int:
    """The version of the default operator set."""
    return max((entry.version for entry in model.opset_import if entry.domain in ("", "ai.onnx")), default=0)


def set_metadata(model: onnx.ModelProto, properties: dict[str, str]) -> None:
    """Replace the model's metadata_props, in sorted order."""
    del model.metadata_props[:]
    for key in sorted(properties):
        entry = model.metadata_props.add()
        entry.key, entry.value = key, properties[key]


def strip_notes(model: onnx.ModelProto) -> None:
    """Drop the exporter's per-node stack traces, doc strings and shape notes: they dwarf a 4-bit mini's weights."""
    graph = model.graph
    for node in graph.node:
        node.doc_string = ""
        del node.metadata_props[:]
    for value in (*graph.input, *graph.output):
        value.doc_string = ""
        del value.metadata_props[:]
    for tensor in graph.initializer:
        tensor.doc_string = ""
        del tensor.metadata_props[:]
    graph.doc_string = ""
    del graph.value_info[:]
    del graph.metadata_props[:]
    del model.functions[:]
