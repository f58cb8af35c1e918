"""Which layers a reconstruction rounds together: a bottleneck of a ResNet, otherwise one layer.

Two values of a graph cut it when nothing else is alive where they are made. Between neighbouring cuts lies a region: in
a convolutional trunk the residual branch keeps values alive, so what falls out are the bottlenecks and the layers of
the stem. Everything that is not a region of convolutions is rounded layer by layer.

Source: block reconstruction (BRECQ, Li et al., arXiv 2102.05426) and arXiv 2511.15411's choice of blocks: bottlenecks
for ResNets, layers for transformers.
"""

from dataclasses import dataclass

import onnx

from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.graph.layers import WeightedLayer

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
    nodes: tuple[onnx.NodeProto, ...]
    input: str
    output: str


def find_regions(twin: onnx.GraphProto, layers: tuple[WeightedLayer, ...]) -> list[Region]:
    """All regions of a twin, so that every layer is in exactly one.

    Args:
        twin: what `fake_quantize` made.
        layers: of the float graph; node names are the same.
    """
    index = GraphIndex(twin)
    by_node = {layer.node: layer for layer in layers}
    regions = []
    for piece in _pieces(twin, index):
        inside = [by_node[node.name] for node in piece if node.name in by_node]
        made = {name for node in piece for name in node.output}
        entering = {name for node in piece for name in node.input if name and name not in index.initializers} - made
        together = len(inside) > 1 and all(node.op_type in REGION_OPS for node in piece) and len(entering) == 1
        if together:
            regions.append(Region(tuple(inside), tuple(piece), entering.pop(), piece[-1].output[0]))
            continue
        for layer in inside:
            node = index.producer[layer.output]
            data = next(name for name in node.input[:2] if name != layer.weight)  # as the twin rounds it, or does not
            regions.append(Region((layer,), (node,), data, layer.output))
    return regions


def _pieces(graph: onnx.GraphProto, index: GraphIndex) -> list[list[onnx.NodeProto]]:
    """The nodes between neighbouring cuts: positions at which exactly one value is alive."""
    last_use: dict[str, int] = {}
    for number, node in enumerate(graph.node):
        for name in node.input:
            last_use[name] = number
    for name in index.outputs:
        last_use[name] = len(graph.node)
    alive = set(index.inputs)
    sizes: set[str] = set()  # the batch size and what is computed from it: not data, though alive to the end
    pieces: list[list[onnx.NodeProto]] = [[]]
    for number, node in enumerate(graph.node):
        pieces[-1].append(node)
        given = [name for name in node.input if name and name not in index.initializers]
        if node.op_type in ("Shape", "Size") or (given and all(name in sizes for name in given)):
            sizes.update(node.output)
            continue
        alive |= {name for name in node.output if name}
        alive = {name for name in alive if last_use.get(name, -1) > number}
        if len(alive) == 1:
            pieces.append([])
    return [piece for piece in pieces if piece]
