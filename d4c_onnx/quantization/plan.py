"""Which nodes are quantised and how many bits each weight gets: decided once, from the float graph and the recipe."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from math import prod

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import WeightedLayer, weighted_layers
from d4c_onnx.graph.values import array, dims, is_constant, is_op, name_of, only_reader, readers
from d4c_onnx.recipe import QuantizationConfig

# Between convolutions the integer path only holds when what stands between them is integer too.
_BETWEEN_CONVOLUTIONS = ("Relu", "Add", "AveragePool", "MaxPool")

NARROWEST = 8  # inputs; no integer kernel gains anything on a narrower product, which stays float

# Of an encoder's weights, what a final projection may hold to stay a float product. Every error of its integers is an
# error of the embedding itself: on a CLIP of really trained weights it cost more than all other weights together.
_SMALL_PROJECTION = 0.02


@dataclass(frozen=True, slots=True)
class Plan:
    """What `quantize_static` is asked to do.

    Attributes:
        layers: the weighted layers, in graph order.
        weight_bits: width of the grid, by initialiser name: 4, 6 or 8; 3, 4 or 5 in groups.
        groups: how many neighbouring inputs share a multiplier, by initialiser name; others have one scale a channel.
        reduce_range: whether products of 8-bit weights are added in 16 bits two by two (`rounding.pairs`).
        nodes: names of all nodes to quantise.
        op_types: their operator types.
        activations: float values whose ranges are needed; none where only weights are quantised.
        in_float: weights of layers that are not quantised, by initialiser name.
        float_bits: what they are stored in: 16, or 8.5 in blocks.
        dead_rows: layer inputs whose first row along axis 1 reaches no output (the start token, once it is pinned).
        outliers: channels of a layer input that its integer product does not read, by the input's name.
        pooled: activations that get two terms, because products of the pooled row alone read them.
    """

    layers: tuple[WeightedLayer, ...]
    weight_bits: dict[str, int]
    nodes: tuple[str, ...]
    op_types: tuple[str, ...]
    activations: tuple[str, ...]
    in_float: tuple[str, ...] = ()
    float_bits: float = 16
    dead_rows: frozenset[str] = frozenset()
    outliers: Mapping[str, tuple[int, ...]] = field(default_factory=dict)
    groups: Mapping[str, int] = field(default_factory=dict)
    reduce_range: bool = False
    pooled: frozenset[str] = frozenset()

    def observed(self, name: str, values: np.ndarray) -> np.ndarray:
        """What counts of an activation for ranges and moments: all but a dead first row; outliers as zeros."""
        seen = values[:, 1:] if name in self.dead_rows else values
        if name in self.outliers:
            seen = seen.copy()
            seen[..., list(self.outliers[name])] = 0
        return seen


def make_plan(
    graph: ir.Graph,
    config: QuantizationConfig,
    widths: Mapping[str, int] | None = None,
    *,
    reduce_range: bool = True,
    grouped: bool = True,
    saturating: bool = True,
) -> Plan:
    """Decide what is quantised.

    The first layer gets `boundary_bits`, and so does the final projection, unless it is small: then it stays a float
    product, stored in 16 bits, or in 8.5 beside groups. Every other weight has the recipe's width.

    Args:
        widths: by node, of weights that have another width than these: 8, or 3 and 5 where groups share multipliers.
        reduce_range: see `Plan`.
        grouped: whether the target can store groups of inputs, should the recipe ask for them.
        saturating: whether a convolution's integer output, whose grid ends where a ReLU6 cuts, stands for the ReLU6;
            symmetric grids do not begin at 0.

    Raises:
        GraphError: the graph has no weighted layer.
    """
    found = [layer for layer in weighted_layers(graph) if _inputs(graph, layer) >= NARROWEST]
    if not found:
        raise GraphError("the graph has no MatMul, Gemm or Conv with a constant weight: nothing to quantise.")
    in_float = set() if config.weights_only else _small_projections(graph, found)
    layers = tuple(layer for layer in found if layer.weight not in in_float)
    widest = max(config.weight_bits, config.boundary_bits)
    bits: dict[str, int] = {}
    for layer in layers:
        own = widest if layer.first or layer.last else config.weight_bits
        own = (widths or {}).get(layer.node, own)
        bits[layer.weight] = max(own, bits.get(layer.weight, 0))  # a shared weight keeps the wider grid
    chosen = {layer.node for layer in layers}
    if any(layer.op == "Conv" for layer in layers):
        chosen |= _between_convolutions(graph, saturating)
    nodes = [node for node in graph if node.name in chosen]
    values = [value for node in nodes for value in (*node.inputs, *node.outputs) if value is not None]
    names = dict.fromkeys(name_of(value) for value in values if not is_constant(value))
    for node in nodes:
        cut = node.inputs[0]
        if cut_at(node) is not None and cut is not None:  # what it cuts is never rounded
            del names[name_of(cut)]
    groups = _groups(graph, layers, bits, config.group_size if grouped else 0)
    return Plan(
        layers,
        bits,
        tuple(node.name or "" for node in nodes),
        tuple(sorted({node.op_type for node in nodes})),
        () if config.weights_only else tuple(names),
        tuple(sorted(in_float)),
        8.5 if groups else 16,
        groups=groups,
        reduce_range=reduce_range,
    )


def _inputs(graph: ir.Graph, layer: WeightedLayer) -> int:
    """How many values each output of a layer is summed from; a grouped convolution's count as those of one group."""
    shape = dims(graph.initializers[layer.weight]) or ()
    return NARROWEST if layer.op == "Conv" else prod(shape) // shape[layer.channel_axis]


def _small_projections(graph: ir.Graph, layers: list[WeightedLayer]) -> set[str]:
    """Weights of products that make the embedding, where they hold a small share of all weights."""
    sizes = {layer.weight: prod(dims(graph.initializers[layer.weight]) or ()) for layer in layers}
    last = {layer.weight for layer in layers if layer.last and layer.op != "Conv"}
    others = {layer.weight for layer in layers if not (layer.last and layer.op != "Conv")}
    small = sum(sizes[weight] for weight in last) <= _SMALL_PROJECTION * sum(sizes.values())
    return last - others if small else set()


def _groups(graph: ir.Graph, layers: tuple[WeightedLayer, ...], bits: Mapping[str, int], size: int) -> dict[str, int]:
    """Of matrices on up to 5 bits whose inputs fall into groups of that size without a rest; size 0: none."""
    found = {}
    for layer in layers if size else ():
        shape = dims(graph.initializers[layer.weight]) or ()
        matrix = layer.op != "Conv" and len(shape) == 2
        if matrix and bits[layer.weight] <= 5 and shape[1 - layer.channel_axis] % size == 0:
            found[layer.weight] = size
    return found


def cut_at(node: ir.Node | None) -> float | None:
    """Where a ReLU6 that alone reads its input cuts: a Clip from 0 to that constant; None for everything else."""
    if node is None or not is_op(node, "Clip") or len(node.inputs) != 3:
        return None
    if node.inputs[0] is None or only_reader(node.inputs[0]) is not node:
        return None
    low, high = array(node.inputs[1]), array(node.inputs[2])
    fits = low is not None and high is not None and low.size == high.size == 1 and float(low.item()) == 0 < high.item()
    return float(high.item()) if fits and high is not None else None


def _between_convolutions(graph: ir.Graph, saturating: bool) -> set[str]:
    """Relu, Add, pools and ReLU6 that can be reached from a Conv through each other only."""
    reached: set[str] = set()
    queue = [value for node in graph if is_op(node, "Conv") for value in node.outputs]
    while queue:
        for node in readers(queue.pop()):
            fits = is_op(node, *_BETWEEN_CONVOLUTIONS) and not any(is_constant(value) for value in node.inputs)
            fits = fits or (saturating and cut_at(node) is not None)
            if fits and node.name not in reached:
                reached.add(node.name or "")
                queue.extend(node.outputs)
    return reached
