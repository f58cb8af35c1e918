"""Which nodes are quantised and how many bits each weight gets: decided once, from the float graph and the recipe."""

from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.graph.layers import WeightedLayer, weighted_layers
from d4c_onnx.quantization.deployment import target_of
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
        probabilities: those of them that a softmax makes: their range is known, [0, 1].
        dead_rows: layer inputs whose first row along axis 1 reaches no output (the start token, once it is pinned).
    """

    layers: tuple[WeightedLayer, ...]
    weight_bits: dict[str, int]
    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    activations: tuple[str, ...]
    probabilities: frozenset[str] = frozenset()
    dead_rows: frozenset[str] = frozenset()

    def observed(self, name: str, values: np.ndarray) -> np.ndarray:
        """What counts of an activation for ranges and moments: all of it, but for a dead first row."""
        return values[:, 1:] if name in self.dead_rows else values


def make_plan(graph: onnx.GraphProto, section: QuantizationSection, raised: Collection[str] = ()) -> Plan:
    """Decide what is quantised.

    The first layer and the final projection get `boundary_bits`, the `raised` nodes 8, every other weight the
    recipe's width; 8-bit ones a grid of 7 where the target asks for a reduced range.

    Raises:
        GraphError: the graph has no weighted layer.
    """
    layers = tuple(weighted_layers(graph))
    if not layers:
        raise GraphError("the graph has no MatMul, Gemm or Conv with a constant weight: nothing to quantise.")
    widest = max(section.weight_bits, section.boundary_bits)
    reduced = target_of(section).reduce_range
    bits: dict[str, int] = {}
    for layer in layers:
        own = widest if layer.first or layer.last else section.weight_bits
        own = 8 if layer.node in raised else own
        own = 7 if own == 8 and reduced else own
        bits[layer.weight] = max(own, bits.get(layer.weight, 0))  # a shared weight keeps the wider grid
    chosen = {layer.node for layer in layers}
    if any(layer.op == "Conv" for layer in layers):
        chosen |= _between_convolutions(graph)
    if section.attention == "int8":
        chosen |= {node.name for node in graph.node if node.op_type == "MatMul"}
    nodes = [node for node in graph.node if node.name in chosen]
    constants = {tensor.name for tensor in graph.initializer}
    names = dict.fromkeys(
        name for node in nodes for name in (*node.input, *node.output) if name and name not in constants
    )
    makers = GraphIndex(graph).producer
    return Plan(
        layers,
        bits,
        tuple(node.name for node in nodes),
        tuple(sorted({node.op_type for node in nodes})),
        () if section.weights_only else tuple(names),
        frozenset(name for name in names if name in makers and makers[name].op_type == "Softmax"),
    )


def _between_convolutions(graph: onnx.GraphProto) -> set[str]:
    """Relu, Add and pools that can be reached from a Conv through each other only."""
    index = GraphIndex(graph)
    reached: set[str] = set()
    queue = [name for node in graph.node if node.op_type == "Conv" for name in node.output]
    while queue:
        for node in index.consumers.get(queue.pop(), []):
            fits = node.op_type in _BETWEEN_CONVOLUTIONS and not any(name in index.initializers for name in node.input)
            if fits and node.name not in reached:
                reached.add(node.name)
                queue.extend(node.output)
    return reached
