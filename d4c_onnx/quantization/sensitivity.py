"""The bit budget: which layers of both encoders are worth 8 bits instead of 4.

`average_bits: 4.8` buys 8-bit weights until the average over every MatMul, Gemm and Conv weight of both encoders would
pass 4.8. What a layer is worth is measured: round its weight alone, run the encoder on from there, and take the mean
square error of the embeddings. Layers are bought greedily, in the order of error per weight.

One pass: the encoder is run piece by piece, and of every layer only what follows it runs once more. For a few samples
that is a fraction of what the rounding of all samples takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from math import prod

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.readers import SpreadReader
from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.layers import channels_back, channels_first
from d4c_onnx.graph.values import constant, dims, nodes_by_name
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import stored_bits
from d4c_onnx.quantization.rounding.grids import grid_of
from d4c_onnx.quantization.rounding.nearest import NearestRounding

_IMAGES, _PROMPTS = 8, 32  # on which a layer's error is measured
# Bits a weight for outlier channels, which leave the integers only after the budget is spent: 0.027 in a ViT-S/14.
RESERVE = 0.035


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer: its encoder, node, number of weights, width, and the embeddings' mean square error at that width."""

    encoder: str
    node: str
    elements: int
    bits: float
    error: float


def measure_costs(
    encoder: str,
    model: ir.Model,
    plan: Plan,
    reader: CalibrationDataReader,
    *,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> list[LayerCost]:
    """Every weighted layer of an encoder; weights that have 8 bits already cost nothing to keep (error 0).

    Behind them what the plan stores in 16 bits, by the weight's name: a budget pays for it, too.

    Args:
        model: the float encoder; not changed.
        reader: rewindable; a few of its samples are looked at.
    """
    samples = _IMAGES if len(model.graph.inputs[0].shape or ()) == 4 else _PROMPTS
    encoder_at = SegmentedEncoder(model, SpreadReader(reader, samples), provider, threads)
    exact = encoder_at.outputs()
    nearest, nodes = NearestRounding(), nodes_by_name(model.graph)
    costs = unmeasured_costs(encoder, model, plan)
    for number, layer in enumerate(plan.layers):
        if costs[number].bits < 8:
            for _ in encoder_at.advance([layer.data]):
                pass
            values = constant(model.graph.initializers[layer.weight])
            grid = grid_of(plan, layer, model.graph, nodes[layer.node])
            rounded = nearest.round(channels_first(values, layer.channel_axis), grid)
            real = channels_back(rounded.dequantize(), values.shape, layer.channel_axis)
            encoder_at.replace(layer.weight, real)
            costs[number] = replace(costs[number], error=float(np.square(encoder_at.outputs() - exact).mean()))
            encoder_at.replace(layer.weight, values)
        on_step("sensitivity", number + 1, len(plan.layers), {})
    return costs


def unmeasured_costs(encoder: str, model: ir.Model, plan: Plan) -> list[LayerCost]:
    """What `measure_costs` returns, in its order, with no error looked at."""
    nodes, costs = nodes_by_name(model.graph), []
    for layer in plan.layers:
        grid = grid_of(plan, layer, model.graph, nodes[layer.node])
        elements = prod(dims(model.graph.initializers[layer.weight]) or ())
        costs.append(LayerCost(encoder, layer.node, elements, stored_bits(grid.num_bits, grid.group_size), 0.0))
    # what stays in 16 bits is paid for first
    sizes = {weight: prod(dims(model.graph.initializers[weight]) or ()) for weight in plan.float16}
    return costs + [LayerCost(encoder, weight, size, 16, 0.0) for weight, size in sizes.items()]


def buys_any(costs: Sequence[LayerCost], average_bits: float, reserve: float = 0.0) -> bool:
    """Whether a budget has 8 bits for any layer of 4, by sizes alone."""
    left = _left(costs, average_bits, reserve)
    return any(_price(cost) <= left for cost in costs if cost.bits < 8)


def _left(costs: Sequence[LayerCost], average_bits: float, reserve: float) -> float:
    weights = sum(cost.elements for cost in costs)
    return (average_bits - reserve) * weights - sum(cost.elements * cost.bits for cost in costs)


def _price(cost: LayerCost) -> float:
    return (8 - cost.bits) * cost.elements


def spend(costs: Sequence[LayerCost], average_bits: float, reserve: float = 0.0) -> Mapping[str, frozenset[str]]:
    """The nodes that get 8 bits, per encoder.

    Args:
        reserve: of `average_bits`, what is left for weights that no cost names.

    Raises:
        RecipeError: even without buying anything the average is higher.
    """
    left = _left(costs, average_bits, reserve)
    if left < 0:
        least = average_bits - left / sum(cost.elements for cost in costs)
        raise RecipeError(
            f"quantization.average_bits: {average_bits} is not reachable, the first and last layers alone bring the "
            f"average to {least:.2f}. Ask for more, or set quantization.boundary_bits: 4."
        )
    bought: dict[str, set[str]] = {cost.encoder: set() for cost in costs}
    for cost in sorted(costs, key=lambda cost: -cost.error / cost.elements):
        if cost.bits < 8 and _price(cost) <= left:
            bought[cost.encoder].add(cost.node)
            left -= _price(cost)
    return {encoder: frozenset(nodes) for encoder, nodes in bought.items()}
