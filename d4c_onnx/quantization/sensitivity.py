"""The bit budget: how wide each layer of both encoders is.

`average_bits: 4.8` spends bits until the average over every MatMul, Gemm and Conv weight of both encoders would pass
4.8. What a layer is worth is measured: round its weight alone, run the encoder on from there, and take the mean square
error of the embeddings. From the narrowest width on, what saves most error a bit is bought first.

One pass: the encoder is run piece by piece, and of every layer only what follows it runs once more. For a few samples
that is a fraction of what the rounding of all samples takes.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from itertools import pairwise
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
# Square error by the width of codes, beside that of 4 bits: of normally distributed weights in groups of 16.
_IN_GROUPS = {3: 4.0, 4: 1.0, 5: 0.27, 8: 0.02}
_ALONE = {4: 1.0, 8: 0.02}  # of weights with one scale a channel
# Bits a weight for outlier channels, which leave the integers only after the budget is spent: 0.043 in a CLIP of a
# ViT-S/14 and a MiniLM, less in wider towers.
RESERVE = 0.05
_LITTLE = 1e-6  # bits that rounding of sums may take


@dataclass(frozen=True, slots=True)
class LayerCost:
    """One layer: its encoder, node, number of weights, width, and the embeddings' mean square error at that width.

    Attributes:
        group_size: inputs that share a multiplier; 0: none do.
    """

    encoder: str
    node: str
    elements: int
    bits: float
    error: float
    group_size: int = 0

    @property
    def choices(self) -> list[tuple[int, float, float]]:
        """Widths that it may have, with their stored bits and their error; none where it keeps its own."""
        if self.bits >= 8:
            return []
        size, errors = self.group_size, _IN_GROUPS if self.group_size else _ALONE
        return [(width, stored_bits(width, size if width < 8 else 0), self.error * errors[width]) for width in errors]


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

    Behind them what the plan leaves in float, by the weight's name: a budget pays for it, too.

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
        bits = stored_bits(grid.num_bits, grid.group_size)
        costs.append(LayerCost(encoder, layer.node, elements, bits, 0.0, grid.group_size))
    # what stays a float product is paid for first
    sizes = {weight: prod(dims(model.graph.initializers[weight]) or ()) for weight in plan.in_float}
    return costs + [LayerCost(encoder, weight, size, plan.float_bits, 0.0) for weight, size in sizes.items()]


def least_bits(costs: Sequence[LayerCost]) -> float:
    """Stored bits a weight, with every layer as narrow as it may be."""
    bits = sum(cost.elements * (cost.choices[0][1] if cost.choices else cost.bits) for cost in costs)
    return bits / sum(cost.elements for cost in costs)


def spend(costs: Sequence[LayerCost], average_bits: float, reserve: float = 0.0) -> Mapping[str, Mapping[str, int]]:
    """The widths of the weights that get another than their own, per encoder and node.

    Args:
        reserve: of `average_bits`, what is left for weights that no cost names.

    Raises:
        RecipeError: even with every layer as narrow as it may be the average is higher.
    """
    ladders = [cost.choices for cost in costs]
    least = least_bits(costs)
    left = (average_bits - reserve - least) * sum(cost.elements for cost in costs) + _LITTLE
    if left < 0:
        raise RecipeError(
            f"quantization.average_bits: {average_bits} is not reachable, the first and last layers alone bring the "
            f"average to {least + reserve:.2f}. Ask for more, or set quantization.boundary_bits: 4."
        )
    steps = []  # error that a bit saves, which layer, to which of its choices, how many bits
    for number, (cost, ladder) in enumerate(zip(costs, ladders, strict=True)):
        for place, ((_, narrow, worse), (_, wide, better)) in enumerate(pairwise(ladder)):
            price = (wide - narrow) * cost.elements
            steps.append(((worse - better) / price, number, place + 1, price))
    reached = [0] * len(costs)
    for _, number, place, price in sorted(steps, key=lambda step: (-step[0], *step[1:])):
        if reached[number] == place - 1 and price <= left:  # each step saves less than the one before
            reached[number], left = place, left - price
    chosen: dict[str, dict[str, int]] = {cost.encoder: {} for cost in costs}
    for cost, ladder, place in zip(costs, ladders, reached, strict=True):
        if ladder and ladder[place][1] != cost.bits:
            chosen[cost.encoder][cost.node] = ladder[place][0]
    return chosen
