"""From a float graph and rounded weights to the graph that is served: QDQ, or float16 whose weights are unpacked."""

from __future__ import annotations

from collections.abc import Mapping

import onnx_ir as ir

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.calibration.readers import first_batches
from d4c_onnx.graph.model import clear_notes
from d4c_onnx.graph.values import set_constant
from d4c_onnx.manifest import RewriteRecord
from d4c_onnx.quantization.encoder_task import EncoderTask
from d4c_onnx.quantization.placed import quantize_placed
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rewrites import add_second_terms, apply_all, in_float16, same_answers
from d4c_onnx.quantization.rounding import RoundedWeights
from d4c_onnx.quantization.storage import (
    clip_activations,
    shorten_names,
    store_blocks,
    store_float16,
    store_narrow,
    store_scaled,
    stored_of,
)

# Max abs difference of an embedding: sums of another order move some activations to the next step of their grid.
_BETWEEN_QUANTISERS = 0.02


def to_qdq(
    model: ir.Model,
    plan: Plan,
    rounded: RoundedWeights,
    ranges: Mapping[str, QuantParams],
    task: EncoderTask,
) -> tuple[ir.Model, tuple[RewriteRecord, ...]]:
    """The QDQ graph as it is served; `model` must not be used afterwards."""
    weights = rounded.weights
    _place_biases(model, rounded)
    quantized = quantize_placed(model, plan, weights, ranges, task.reader, task.target)
    clear_notes(quantized)
    # known by themselves from here on: rewrites give products other names
    stored = stored_of(quantized, {layer.node for layer in plan.layers})
    held = {stored[layer.node]: (weights[layer.weight], layer.channel_axis) for layer in plan.layers}
    clip_activations(quantized, ranges)
    # before the pooled row leaves the others: it takes both terms with it
    second = add_second_terms(quantized, ranges) if task.target.two_terms else ()
    verify = same_answers(first_batches(task.reader, 2), _BETWEEN_QUANTISERS) if task.verify else None
    applied = (*second, *apply_all(task.target.served_rewrites, quantized, verify))
    if any(weight.num_bits <= 5 for weight in weights.values()):
        store_narrow(quantized, held, task.target.int4)
    # behind it, for what no layer holds is taken for 4 bits there
    (store_float16 if plan.float_bits == 16 else store_blocks)(quantized, plan.in_float)
    shorten_names(quantized)
    return quantized, applied


def to_float16(
    model: ir.Model,
    plan: Plan,
    rounded: RoundedWeights,
    ranges: Mapping[str, QuantParams],
    task: EncoderTask,
) -> tuple[ir.Model, tuple[RewriteRecord, ...]]:
    """Weights only: the float16 graph, whose weights are unpacked when it is loaded."""
    _place_biases(model, rounded)
    converted, applied = in_float16(model, rounded=True)
    store_scaled(
        converted, {layer.weight: (rounded.weights[layer.weight], layer.channel_axis) for layer in plan.layers}
    )
    return converted, applied


def _place_biases(model: ir.Model, rounded: RoundedWeights) -> None:
    for name, values in rounded.biases.items():
        set_constant(model.graph, name, values)
