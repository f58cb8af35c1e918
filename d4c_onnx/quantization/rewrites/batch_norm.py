"""Batch norm into the convolution before it: exact.

A BatchNormalization in inference is y = g (x - m) / sqrt(v + e) + b, channel by channel. With x = W * u + c,

    y = (a W) * u + a (c - m) + b,      a = g / sqrt(v + e).

The exporter's own optimiser folds most of them; this one is for graphs that come from elsewhere. It has to come before
the rounding: folded afterwards, `a` would pull the weights off their grid.
"""

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.values import (
    array,
    attribute,
    constant,
    is_op,
    maker,
    name_of,
    nodes_of,
    only_reader,
    readers,
    set_constant,
    take_over,
)
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _fold(model: ir.Model) -> Result:
    count, refused = 0, []
    for norm in nodes_of(model.graph, "BatchNormalization"):
        conv = maker(norm.inputs[0])
        reason = _obstacle(norm, conv)
        if reason or conv is None:
            refused.append(Refusal(norm.name or "", reason))
            continue
        _fold_one(model.graph, norm, conv)
        count += 1
    return Result(count, tuple(refused))


def _obstacle(norm: ir.Node, conv: ir.Node | None) -> str:
    if conv is None or not is_op(conv, "Conv"):
        return "what it normalises is not made by a convolution"
    if only_reader(conv.outputs[0]) is not norm:
        return "something else reads the convolution, too"
    if any(array(value) is None for value in norm.inputs[1:5]):
        return "its statistics are not constants"
    own = [value for value in conv.inputs[1:3] if value is not None]
    if any(array(value) is None or len(readers(value)) > 1 for value in own):
        return "the convolution's weight or bias is not a constant of its own"
    return ""


def _fold_one(graph: ir.Graph, norm: ir.Node, conv: ir.Node) -> None:
    weight, bias = conv.inputs[1], conv.inputs[2] if len(conv.inputs) > 2 else None
    assert weight is not None
    gain, shift, mean, variance = (constant(value).astype(np.float64) for value in norm.inputs[1:5])
    factor = gain / np.sqrt(variance + float(attribute(norm, "epsilon", 1e-5)))
    values = constant(weight).astype(np.float64)
    before = constant(bias).astype(np.float64) if bias is not None else np.zeros(1)
    moved = values * factor.reshape(-1, *[1] * (values.ndim - 1))
    set_constant(graph, name_of(weight), moved.astype(np.float32))
    name = name_of(bias) if bias is not None else f"{name_of(weight)}_folded_bias"
    folded = set_constant(graph, name, (factor * (before - mean) + shift).astype(np.float32))
    conv.resize_inputs(3)
    conv.replace_input_with(2, folded)
    take_over(norm.outputs[0], conv.outputs[0])


FOLD_BATCH_NORMS = Rewrite("batch norms folded into convolutions", "a float graph", _fold)
