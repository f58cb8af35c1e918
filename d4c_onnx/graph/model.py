"""A model in memory is an `onnx_ir.Model`: values know who makes and who reads them. Reading and writing it.

Protobuf appears where something else wants it: `quantize_static` a file, a session bytes or a file.
"""

from __future__ import annotations

import contextlib
import logging
from collections.abc import Callable, Iterator, Mapping, Sequence
from itertools import chain
from math import prod
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import ClearMetadataAndDocStringPass, NameFixPass, RemoveUnusedNodesPass

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.one_file import write_one_file
from d4c_onnx.graph.values import STANDARD
from d4c_onnx.manifest import Signature, TensorInfo
from d4c_onnx.untrusted_json import quoted, short

PROTOBUF_LIMIT_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the margin is for the graph around the weights
EXTERNAL_SUFFIX = ".data"
_EXTERNAL_FROM_BYTES = 1024  # smaller constants stay in the graph, where shape inference looks for them
_ALIGN_BYTES = 4096  # a page: what is read in place starts on one
_SMALL = 1024  # values of a constant that may say what shape another value has
# Operators whose meaning (not only whose types) changed between opset 17 and 23.
_CHANGED = {"GridSample", "GroupNormalization", "DFT"}
_IR_VERSIONS = ((23, 11), (21, 10), (0, 8))  # from which opset on, which IR version


def load_model(path: Path) -> ir.Model:
    """Read a model; weights beside the graph are mapped, not copied. Every node has a name of its own afterwards.

    Raises:
        GraphError: the file is not an ONNX model.
    """
    try:
        with _quiet():
            model = ir.load(path)
        NameFixPass()(model)  # plans, ranges and reports name nodes and values
    except FileNotFoundError as error:
        raise GraphError(f"{path}: no such file.") from error
    except Exception as error:  # protobuf's DecodeError has no stable public name
        raise GraphError(f"{path}: not an ONNX model ({short(error)}).") from error
    odd = next((text for text in _texts(model) if isinstance(text, bytes)), None)
    if odd is not None:  # protobuf hands it over so, and refuses it only when the model is written
        raise GraphError(f"{path}: breaks ONNX's rules ({quoted(odd)} is no UTF-8 text). Export it again.")
    _check_external(model, path.parent)
    for node in model.graph.all_nodes():
        for value in node.inputs:
            if value is not None and not (value.producer() or value.is_graph_input() or value.is_initializer()):
                why = f"{quoted(value.name)} is read, and nothing makes it"
                raise GraphError(f"{path}: breaks ONNX's rules ({why}). Export it again.")
    return model


def _texts(model: ir.Model) -> Iterator[object]:
    """Every name, and what is noted beside them."""
    yield from (model.producer_name, model.producer_version, model.domain, model.doc_string)
    yield from chain.from_iterable(model.metadata_props.items())
    for graph in model.graphs():
        yield from (graph.name, graph.doc_string, *chain.from_iterable(graph.metadata_props.items()))
        yield from (value.name for value in (*graph.inputs, *graph.outputs, *graph.initializers.values()))
    for node in _every_node(model):
        yield from (node.name, node.op_type, node.domain, node.overload, node.doc_string)
        yield from (*node.attributes, *chain.from_iterable(node.metadata_props.items()))
        for value in node.outputs:
            yield from (value.name, value.doc_string, *chain.from_iterable(value.metadata_props.items()))


def _every_node(model: ir.Model) -> Iterator[ir.Node]:
    """Of the graph, of graphs inside it, and of functions."""
    yield from model.graph.all_nodes()
    for function in model.functions.values():
        yield from function.all_nodes()


@contextlib.contextmanager
def _quiet() -> Iterator[None]:
    """onnx_ir tells of each fault of a graph on stderr, and goes on; what is wrong is said once, by an error."""
    logger = logging.getLogger("onnx_ir")
    before = logger.level
    logger.setLevel(logging.CRITICAL)
    try:
        yield
    finally:
        logger.setLevel(before)


def _check_external(model: ir.Model, folder: Path) -> None:
    """Weights beside the graph are read when they are needed; that they are there, and beside it, is seen now.

    Tensors of graphs inside the graph, of functions and of nodes' attributes count, too.

    Raises:
        GraphError: a file is missing, or lies elsewhere.
    """
    tensors = [value.const_value for graph in model.graphs() for value in graph.initializers.values()]
    attributes = (entry for node in _every_node(model) for entry in node.attributes.values())
    tensors += [entry.value for entry in attributes if entry.type == ir.AttributeType.TENSOR]
    for location in {Path(tensor.path) for tensor in tensors if isinstance(tensor, ir.ExternalTensor)}:
        if not location.resolve().is_relative_to(folder.resolve()):
            raise GraphError(f"{location}: the graph looks for weights outside its folder {folder}. Do not use it.")
        if not location.is_file():
            raise GraphError(f"{location}: the weights that the graph refers to are missing. Put the file beside it.")


def model_of(proto: onnx.ModelProto) -> ir.Model:
    """A model that torch's exporter or a converter of onnxruntime hands over as protobuf."""
    model = ir.from_proto(proto)
    NameFixPass()(model)
    return model


def to_proto(model: ir.Model) -> onnx.ModelProto:
    """The model as one protobuf, weights that lie beside the graph read into it."""
    proto = ir.to_proto(model)
    for tensor in proto.graph.initializer:
        if tensor.data_location == onnx.TensorProto.EXTERNAL:
            value = model.graph.initializers[tensor.name].const_value
            tensor.ClearField("external_data")
            tensor.ClearField("data_location")
            tensor.raw_data = value.tobytes() if value is not None else b""
    return proto


def weight_bytes(model: ir.Model) -> int:
    """What a model's initialisers take."""
    return sum(tensor.nbytes for _, tensor in _tensors(model))


def save_model(
    model: ir.Model,
    path: Path,
    limit_bytes: int | None = None,
    replaced: Mapping[str, Callable[[], np.ndarray]] | None = None,
) -> None:
    """Write a model to a staged path; weights go to `<path>.data` when one file cannot hold them.

    The model itself stays as it is, and weights beside the graph are written one by one: no second copy of them is made
    in memory.

    Args:
        limit_bytes: how many bytes of weights one file may hold; none: as many as a protobuf can.
        replaced: by initialiser what makes other values for it, of its own shape and type.
    """
    beside = weight_bytes(model) > (PROTOBUF_LIMIT_BYTES if limit_bytes is None else limit_bytes)
    own = {value: (value.const_value, value.type, value.shape) for value in model.graph.initializers.values()}
    for value, (tensor, _, _) in own.items():
        make = (replaced or {}).get(value.name or "")
        if tensor is not None and make is not None:
            value.const_value = _later(value.name or "", tensor, make)
        if not value.is_graph_input():  # or the file would note each weight's type and shape once more
            value.type, value.shape = None, None
    try:
        if beside:
            place = {"external_data": path.name + EXTERNAL_SUFFIX, "alignment": _ALIGN_BYTES, "align_threshold": 0}
            ir.save(model, path, size_threshold_bytes=_EXTERNAL_FROM_BYTES - 1, **place)  # type: ignore[arg-type]
        else:
            _write_one_file(model, path)
    finally:
        for value, (tensor, kind, shape) in own.items():
            value.const_value, value.type, value.shape = tensor, kind, shape


def _write_one_file(model: ir.Model, path: Path) -> None:
    """Large weights come from where they are, one at a time."""
    with path.open("wb") as file:
        write_one_file(model, {name: tensor for name, tensor in _tensors(model) if _is_plain(tensor)}, file)


def _tensors(model: ir.Model) -> Iterator[tuple[str, Any]]:
    return ((name, value.const_value) for name, value in model.graph.initializers.items() if value.const_value)


def _is_plain(tensor: Any) -> bool:
    """Whether a file holds it as the bytes of its values: no strings, nor what came as a list of numbers.

    All that lies beside the graph does: left in the model, it would be written as a reference to another file.
    """
    if isinstance(tensor, ir.ExternalTensor):
        return True
    listed = isinstance(tensor, ir.serde.TensorProtoTensor) and not tensor.raw.HasField("raw_data")
    return tensor.dtype != ir.DataType.STRING and tensor.nbytes >= _EXTERNAL_FROM_BYTES and not listed


def _later(name: str, like: Any, make: Callable[[], np.ndarray]) -> ir.LazyTensor:
    """A tensor that is computed when it is written, so that all replaced ones are never in memory together."""

    def made() -> ir.Tensor:
        return ir.Tensor(np.ascontiguousarray(make()), name=name)

    return ir.LazyTensor(made, dtype=like.dtype, shape=like.shape, name=name, cache=False)


def raise_opset(model: ir.Model, version: int) -> None:
    """Relabel the default domain's opset, in place. Our operators only gained types between 17 and 23.

    Raises:
        GraphError: the graph holds an operator whose meaning changed on the way.
    """
    changed = sorted({node.op_type for node in model.graph.all_nodes() if node.domain in STANDARD} & _CHANGED)
    if changed:
        raise GraphError(f"cannot raise the opset to {version}: {', '.join(changed)} changed its meaning on the way.")
    model.graph.opset_imports[""] = max(opset_of(model), version)
    model.ir_version = max(model.ir_version, next(least for since, least in _IR_VERSIONS if version >= since))


def opset_of(model: ir.Model) -> int:
    """The version of the default operator set."""
    return max((model.graph.opset_imports.get(domain) or 0 for domain in STANDARD), default=0)


def set_metadata(model: ir.Model, properties: Mapping[str, str]) -> None:
    """Replace the model's metadata_props, in sorted order."""
    model.metadata_props.clear()
    model.metadata_props.update({key: properties[key] for key in sorted(properties)})


def clear_notes(model: ir.Model) -> None:
    """Drop the exporter's stack traces, doc strings and inferred shapes: they dwarf a 4-bit mini's weights."""
    kept = dict(model.metadata_props)
    ClearMetadataAndDocStringPass()(model)
    model.metadata_props.update(kept)
    model.functions.clear()
    given = {*model.graph.inputs, *model.graph.outputs}
    for value in (*given, *model.graph.initializers.values()):
        value.metadata_props.clear()
        value.doc_string = None
    for node in model.graph.all_nodes():
        for value in node.outputs:
            value.metadata_props.clear()
            if value not in given:
                value.shape, value.type = None, None


def drop_unused(model: ir.Model) -> bool:
    """Remove nodes and initialisers that no output needs; whether there were any."""
    return bool(RemoveUnusedNodesPass()(model).modified)


def with_shapes(model: ir.Model) -> onnx.ModelProto:
    """The model as protobuf, the type and shape of every value that ONNX can infer noted; for a model of any size.

    Large constants are stood for by their shapes while they are inferred: onnx would write out the whole model, which
    above 2 GB it cannot.
    """
    whole = to_proto(model)
    shell = shell_of(whole, kept=_SMALL)
    inferred = onnx.shape_inference.infer_shapes(shell)
    del whole.graph.value_info[:]
    whole.graph.value_info.extend(inferred.graph.value_info)
    return whole


def shell_of(whole: onnx.ModelProto, kept: int = -1) -> onnx.ModelProto:
    """A model whose weights of more than `kept` values are inputs: enough to ask about operators, types and shapes."""
    shell = without_weights(whole)
    for tensor in whole.graph.initializer:
        if prod(tensor.dims) <= kept:
            shell.graph.initializer.append(tensor)
        else:
            entry = onnx.helper.make_tensor_value_info(tensor.name, tensor.data_type, tensor.dims)
            shell.graph.input.append(entry)
    return shell


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


@contextlib.contextmanager
def with_outputs(model: ir.Model, names: Sequence[str] | None) -> Iterator[ir.Model]:
    """The model itself with the named values for graph outputs; it gets its own back at the end.

    None leaves it as it is. New outputs carry no type: onnxruntime infers it.
    """
    if names is None:
        yield model
        return
    own = list(model.graph.outputs)
    values = {value.name: value for node in model.graph for value in node.outputs}
    model.graph.outputs.clear()
    model.graph.outputs.extend(values[name] for name in names)
    try:
        yield model
    finally:
        model.graph.outputs.clear()
        model.graph.outputs.extend(own)


def signature_of(model: ir.Model) -> Signature:
    """Inputs, outputs and opset, read from the graph."""
    inputs, outputs = (tuple(map(_describe, values)) for values in (model.graph.inputs, model.graph.outputs))
    return Signature(inputs, outputs, opset_of(model))


def _describe(value: ir.Value) -> TensorInfo:
    shape = tuple(size if isinstance(size, int) else size.value or 0 for size in value.shape or ())
    try:
        dtype = "unknown" if value.dtype is None else value.dtype.numpy().name
    except TypeError:  # numpy has no such type
        dtype = "unknown"
    return TensorInfo(value.name or "", dtype, shape)
