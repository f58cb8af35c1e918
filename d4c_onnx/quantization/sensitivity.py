"""The bit budget: which layers of both encoders are worth 8 bits instead of 4.

`average_bits: 4.8` buys 8-bit weights until the average over every MatMul, Gemm and Conv weight of both encoders would
pass 4.8. What a layer is worth is measured: round its weight alone, run the encoder, and take the mean square error
of the embeddings. Layers are bought greedily, in the order of error per weight.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.readers import first_batches
from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.layers import channels_back, channels_first
from d4c_onnx.graph.values import constant, set_constant
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import stored_bits
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.runtime.session import EncoderSession

_SAMPLES = 32  # images, or prompts, on which a layer's error is measured


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
    """Every weighted layer of an encoder; weights that have 8 bits already cost nothing to keep (error 0)."""
    feeds = first_batches(reader, _SAMPLES)

    def embeds(candidate: ir.Model) -> np.ndarray:
        session = EncoderSession.of_model(candidate, provider, threads)
        return np.concatenate([session.run(feed) for feed in feeds])

    exact = embeds(model)
    trial = model.clone()
    nearest = NearestRounding()
    costs = []
    for number, layer in enumerate(plan.layers):
        values, bits = constant(model.graph.initializers[layer.weight]), plan.weight_bits[layer.weight]
        groups, error = plan.groups.get(layer.weight), 0.0
        width = stored_bits(bits, groups)
        if width < 8:
            rounded = nearest.round(channels_first(values, layer.channel_axis), bits, groups=groups)
            real = channels_back(rounded.dequantize(), values.shape, layer.channel_axis)
            set_constant(trial.graph, layer.weight, real)
            error = float(np.square(embeds(trial) - exact).mean())
            set_constant(trial.graph, layer.weight, values)
        costs.append(LayerCost(encoder, layer.node, int(values.size), width, error))
        on_step("sensitivity", number + 1, len(plan.layers), {})
    return costs


def spend(costs: Sequence[LayerCost], average_bits: float, reserve: float = 0.0) -> Mapping[str, frozenset[str]]:
    """The nodes that get 8 bits, per encoder.

    Args:
        reserve: of `average_bits`, what is left for weights that no cost names.

    Raises:
        RecipeError: even without buying anything the average is higher.
    """
    weights = sum(cost.elements for cost in costs)
    left = (average_bits - reserve) * weights - sum(cost.elements * cost.bits for cost in costs)
    if left < 0:
        least = average_bits - left / weights
        raise RecipeError(
            f"quantization.average_bits: {average_bits} is not reachable, the first and last layers alone bring the "
            f"average to {least:.2f}. Ask for more, or set quantization.boundary_bits: 4."
        )
    bought: dict[str, set[str]] = {cost.encoder: set() for cost in costs}
    for cost in sorted(costs, key=lambda cost: -cost.error / cost.elements):
        price = (8 - cost.bits) * cost.elements
        if cost.bits < 8 and price <= left:
            bought[cost.encoder].add(cost.node)
            left -= price
    return {encoder: frozenset(nodes) for encoder, nodes in bought.items()}
