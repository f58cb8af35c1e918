"""The grid of a planned weight."""

import onnx_ir as ir

from d4c_onnx.graph.layers import WeightedLayer
from d4c_onnx.graph.values import dims
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import WeightGrid
from d4c_onnx.quantization.rounding.pairs import partners_of


def grid_of(plan: Plan, layer: WeightedLayer, graph: ir.Graph, node: ir.Node) -> WeightGrid:
    """Where the integers of a layer's weight may lie.

    Args:
        graph: the float graph of the plan.
        node: of the layer.
    """
    bits, shape = plan.weight_bits[layer.weight], dims(graph.initializers[layer.weight]) or ()
    paired = bits == 8 and plan.reduce_range
    return WeightGrid(
        bits, plan.groups.get(layer.weight, 0), partners_of(node, shape, layer.channel_axis) if paired else None
    )
