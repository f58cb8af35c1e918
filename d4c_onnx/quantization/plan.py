"""Which nodes are quantised and how many bits each weight gets: decided once, from the float graph and the recipe."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import WeightedLayer, weighted_layers
from d4c_onnx.graph.values import is_constant, is_op, name_of, readers
from d4c_onnx.recipe import QuantizationSection

# Between convolutions the integer path only holds when what stands between them is integer too.
_BETWEEN_CONVOLUTIONS = ("Relu", "Add", "AveragePool", "MaxPool")


@dataclass(frozen=True, slots=True)
class Plan:
    """What `quantize_static` is asked to do.

    Attributes:
        layers: the weighted layers, in graph order.
        weight_bits: width of the grid, by initialiser name: 4, 6, 8, or 7 for an 8-bit weight of reduced range.
        nodes: names of all nodes to quantise.
        op_types: their operator types.
        activations: float values whose ranges are needed; none where only weights are quantised.
        dead_rows: layer inputs whose first row along axis 1 reaches no output (the start token, once it is pinned).
    """

    layers: tuple[WeightedLayer, ...]
    weight_bits: dict[str, int]
    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    activations: tuple[str, ...]
    dead_rows: frozenset[str] = frozenset()

    def observed(self, name: str, values: np.ndarray) -> np.ndarray:
        """What counts of an activation for ranges and moments: all of it, but for a dead first row."""
        return values[:, 1:] if name in self.dead_rows else values


def make_plan(
    graph: ir.Graph, section: QuantizationSection, eight_bit_nodes: Collection[str] = (), *, reduce_range: bool = True
) -> Plan:
    """Decide what is quantised.

    The first layer and the final projection get `boundary_bits`, the `eight_bit_nodes` 8, every other weight the
    recipe's width; 8-bit ones a grid of 7 where their range is to be reduced.

    Raises:
        GraphError: the graph has no weighted layer.
    """
    layers = tuple(weighted_layers(graph))
    if not layers:
        raise GraphError("the graph has no MatMul, Gemm or Conv with a constant weight: nothing to quantise.")
    widest = max(section.weight_bits, section.boundary_bits)
    bits: dict[str, int] = {}
    for layer in layers:
        own = widest if layer.first or layer.last else section.weight_bits
        own = 8 if layer.node in eight_bit_nodes else own
        own = 7 if own == 8 and reduce_range else own
        bits[layer.weight] = max(own, bits.get(layer.weight, 0))  # a shared weight keeps the wider grid
    chosen = {layer.node for layer in layers}
    if any(layer.op == "Conv" for layer in layers):
        chosen |= _between_convolutions(graph)
    nodes = [node for node in graph if node.name in chosen]
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    names = dict.fromkeys(name_of(value) for value in values if not is_constant(value))
    return Plan(
        layers,
        bits,
        tuple(node.name or "" for node in nodes),
        tuple(sorted({node.op_type for node in nodes})),
        () if section.weights_only else tuple(names),
    )


def _between_convolutions(graph: ir.Graph) -> set[str]:
    """Relu, Add and pools that can be reached from a Conv through each other only."""
    reached: set[str] = set()
    queue = [value for node in graph if is_op(node, "Conv") for value in node.outputs]
    while queue:
        for node in readers(queue.pop()):
            fits = is_op(node, *_BETWEEN_CONVOLUTIONS) and not any(is_constant(value) for value in node.inputs)
            if fits and node.name not in reached:
                reached.add(node.name or "")
                queue.extend(node.outputs)
    return reached
