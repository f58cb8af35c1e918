"""The door: what an ONNX file that somebody brings must be before anything else looks at it."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import onnx
import onnx_ir as ir
from onnx_ir.passes.common import (
    IdentityEliminationPass,
    InlinePass,
    LiftConstantsToInitializersPass,
    NameFixPass,
    RemoveInitializersFromInputsPass,
)

from d4c_onnx.errors import ModelError
from d4c_onnx.foreign.contrib import expand_contrib, is_expanded
from d4c_onnx.graph.model import PROTOBUF_LIMIT_BYTES, clear_notes, drop_unused, load_model, opset_of, raise_opset
from d4c_onnx.graph.values import STANDARD, attribute, set_constant
from d4c_onnx.untrusted_json import check_readable, quoted, short

_OLDEST, _NEWEST = 13, 23
# From here on Gelu is an operator, and reductions take their axes as an input.
_OWN_OPSET = 20
_LARGEST = 2**36  # weights beside a graph; the largest CLIP has a quarter of it
_QUANTIZED = ("QuantizeLinear", "DequantizeLinear", "DynamicQuantizeLinear", "MatMulInteger", "ConvInteger")
_REDUCTIONS = ("Max", "Mean", "Min", "Prod", "L1", "L2", "LogSum", "LogSumExp", "SumSquare")


def let_in(path: Path) -> ir.Model:
    """Read a float32 graph of standard operators, in the opset that our rewrites know.

    Functions and onnxruntime's own operators are written out, constants are initialisers, and nothing but what the
    outputs need is left.

    Raises:
        GraphError: it is no ONNX model, or its weights are missing or lie outside its folder.
        ModelError: it breaks ONNX's rules, is too large, too old or too new, or holds what cannot be quantised.
    """
    _check_size(path)
    model = load_model(path)
    _check_weights(model, path)
    try:
        onnx.checker.check_model(str(path))
    except Exception as error:  # the checker raises several kinds
        raise ModelError(f"{path}: breaks ONNX's rules ({short(error)}). Export it again.") from error
    for model_pass in (
        InlinePass(),
        RemoveInitializersFromInputsPass(),
        LiftConstantsToInitializersPass(lift_all_constants=True, size_limit=0),
        IdentityEliminationPass(),
        NameFixPass(),
    ):
        model_pass(model)
    clear_notes(model)
    drop_unused(model)
    _check_operators(model, path)
    _raise(model, path)
    expand_contrib(model, path)
    return model


def _check_size(path: Path) -> None:
    check_readable(path, ModelError)
    if not path.is_file():
        raise ModelError(f"{path}: no such file.")
    if path.stat().st_size > PROTOBUF_LIMIT_BYTES:
        raise ModelError(f"{path}: is larger than an ONNX graph can be. Keep its weights in a file beside it.")


def _check_weights(model: ir.Model, path: Path) -> None:
    """What lies beside the graph is mapped only, whatever the graph says of its size."""
    beside = [value.const_value for value in model.graph.initializers.values()]
    total = sum(tensor.size for tensor in beside if isinstance(tensor, ir.ExternalTensor))
    if total > _LARGEST:
        raise ModelError(f"{path}: says that it has {total:,} weights, which no CLIP has. Do not use it.")


def _check_operators(model: ir.Model, path: Path) -> None:
    """Only ONNX's own operators, and those of onnxruntime that can be written in them, on float32."""
    for node in model.graph.all_nodes():
        if node.domain not in STANDARD and not is_expanded(node):
            raise ModelError(
                f"{path}: holds {quoted(f'{node.domain}:{node.op_type}')}, which is no standard operator, and none of "
                "onnxruntime's that are known here. Export it again without optimisations for one runtime."
            )
        if node.op_type in _QUANTIZED or node.op_type.startswith("QLinear"):
            raise ModelError(f"{path}: is quantised already ({node.op_type}). Import the float32 file.")
    for value in model.graph.initializers.values():
        if value.dtype in (ir.DataType.FLOAT16, ir.DataType.BFLOAT16, ir.DataType.DOUBLE):
            raise ModelError(
                f"{path}: has weights in {value.dtype.name.lower()} ({quoted(value.name)}). Import the float32 file."
            )


def _raise(model: ir.Model, path: Path) -> None:
    """To the opset that our rewrites know, in place."""
    opset = opset_of(model)
    if not _OLDEST <= opset <= _NEWEST:
        raise ModelError(
            f"{path}: is of opset {opset}, understood are {_OLDEST} to {_NEWEST}. Export it again with 17 or newer."
        )
    if opset < 18:
        for node in list(model.graph.all_nodes()):
            if node.op_type.removeprefix("Reduce") in _REDUCTIONS and node.op_type.startswith("Reduce"):
                axes = node.attributes.pop("axes", None)
                if axes is not None:
                    name = f"{node.name}_axes"
                    node.resize_inputs(2)
                    node.replace_input_with(1, set_constant(model.graph, name, np.array(axes.value, np.int64)))
            if node.op_type == "Split" and (len(node.inputs) < 2 or node.inputs[1] is None):
                node.attributes["num_outputs"] = ir.AttrInt64("num_outputs", len(node.outputs))
            if node.op_type == "Resize" and attribute(node, "coordinate_transformation_mode") == "tf_crop_and_resize":
                raise ModelError(f"{path}: {quoted(node.name)} crops and resizes at once. Export it with 18 or newer.")
    raise_opset(model, _OWN_OPSET)
