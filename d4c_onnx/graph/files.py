"""Reading and writing ONNX files, with external data where one protobuf cannot hold the weights."""

from pathlib import Path

import onnx

from d4c_onnx.errors import GraphError

PROTOBUF_LIMIT_BYTES = 2**31 - 2**20  # a protobuf message ends at 2 GiB; the margin is for the graph around the weights
EXTERNAL_SUFFIX = ".data"
# Operators whose meaning (not only whose types) changed between opset 17 and 21.
_CHANGED = {"GridSample", "GroupNormalization", "DFT"}


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


def save_graph(model: onnx.ModelProto, path: Path, limit_bytes: int = PROTOBUF_LIMIT_BYTES) -> None:
    """Write a model to a staged path; weights go to `<path>.data` when they pass `limit_bytes`."""
    if sum(len(tensor.raw_data) for tensor in model.graph.initializer) > limit_bytes:
        onnx.save_model(
            model, path, save_as_external_data=True, location=path.name + EXTERNAL_SUFFIX, size_threshold=1024
        )
    else:
        onnx.save_model(model, path)


def raise_opset(model: onnx.ModelProto, version: int) -> None:
    """Relabel the default domain's opset, in place. Our operators only gained types between 17 and 21.

    Raises:
        GraphError: the graph holds an operator whose meaning changed on the way.
    """
    changed = sorted({node.op_type for node in model.graph.node} & _CHANGED)
    if changed:
        raise GraphError(f"cannot raise the opset to {version}: {', '.join(changed)} changed its meaning on the way.")
    for entry in model.opset_import:
        if entry.domain in ("", "ai.onnx") and entry.version < version:
            entry.version = version
    model.ir_version = max(model.ir_version, 10 if version >= 21 else 8)


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
