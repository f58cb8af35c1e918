"""Which layers a reconstruction rounds together: a bottleneck of a ResNet, otherwise one layer.

Two values of a graph cut it when nothing else is alive where they are made. Between neighbouring cuts lies a region: in
a convolutional trunk the residual branch keeps values alive, so what falls out are the bottlenecks and the layers of
the stem. Everything that is not a region of convolutions is rounded layer by layer.

Source: block reconstruction (BRECQ, Li et al., arXiv 2102.05426) and arXiv 2511.15411's choice of blocks: bottlenecks
for ResNets, layers for transformers.
"""

from dataclasses import dataclass

import onnx_ir as ir

from d4c_onnx.graph.layers import WeightedLayer
from d4c_onnx.graph.values import is_constant, is_op, name_of

# What a region of convolutions may hold (the fake-quantised twin's rounding nodes included).
REGION_OPS = ("Conv", "Relu", "Add", "AveragePool", "MaxPool", "Clip", "QuantizeLinear", "DequantizeLinear")


@dataclass(frozen=True, slots=True)
class Region:
    """A piece of the fake-quantised twin, in graph order.

    Attributes:
        layers: the weighted layers that are rounded together.
        nodes: from `input` to `output`.
        input: the value that enters, as the twin makes it.
        output: the value that leaves; of the same name in the float graph.
    """

    layers: tuple[WeightedLayer, ...]
    nodes: tuple[ir.Node, ...]
    input: str
    output: str


def find_regions(twin: ir.Graph, layers: tuple[WeightedLayer, ...]) -> list[Region]:
    """All regions of a twin, so that every layer is in exactly one.

    Args:
        twin: what `fake_quantize` made.
        layers: of the float graph; node names are the same.
    """
    by_node = {layer.node: layer for layer in layers}
    regions = []
    for piece in _pieces(twin):
        inside = [by_node[node.name] for node in piece if node.name in by_node]
        made = {value for node in piece for value in node.outputs}
        entering = {value for node in piece for value in _data(node)} - made
        together = len(inside) > 1 and all(is_op(node, *REGION_OPS) for node in piece) and len(entering) == 1
        if together:
            last = name_of(piece[-1].outputs[0])
            regions.append(Region(tuple(inside), tuple(piece), name_of(entering.pop()), last))
            continue
        for node in piece:
            if node.name in by_node:
                layer = by_node[node.name]
                data = next(name_of(value) for value in _data(node))  # as the twin rounds it, or does not
                regions.append(Region((layer,), (node,), data, layer.output))
    return regions


def _data(node: ir.Node) -> list[ir.Value]:
    return [value for value in node.inputs if value is not None and not is_constant(value)]


def _pieces(graph: ir.Graph) -> list[list[ir.Node]]:
    """The nodes between neighbouring cuts: positions at which exactly one value is alive."""
    nodes = list(graph)
    last_use = {value: number for number, node in enumerate(nodes) for value in node.inputs if value is not None}
    last_use |= dict.fromkeys(graph.outputs, len(nodes))
    alive = set(graph.inputs)
    sizes: set[ir.Value] = set()  # the batch size and what is computed from it: not data, though alive to the end
    pieces: list[list[ir.Node]] = [[]]
    for number, node in enumerate(nodes):
        pieces[-1].append(node)
        given = _data(node)
        if is_op(node, "Shape", "Size") or (given and all(value in sizes for value in given)):
            sizes.update(node.outputs)
            continue
        alive |= set(node.outputs)
        alive = {value for value in alive if last_use.get(value, -1) > number}
        if len(alive) == 1:
            pieces.append([])
    return [piece for piece in pieces if piece]
