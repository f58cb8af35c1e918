"""QuickGELU without the constant in its sigmoid: exact.

With a = 1.702, h sigmoid(a h) = z sigmoid(z) / a for z = a h: the layer before takes a, the layer behind 1 / a, and a
pass over the widest values of a block is gone. What is left is SiLU, for which onnxruntime has one kernel where the
processor has AVX-512.
"""

import numpy as np
import onnx

from d4c_onnx.graph.index import GraphIndex, drop_unused
from d4c_onnx.graph.layers import weighted_layers
from d4c_onnx.quantization.folding.places import apply_scale, find_places


def fold_gates(model: onnx.ModelProto) -> int:
    """Move the constants of QuickGELUs into the layers around them, in place; returns how many.

    A QuickGELU whose constant is a vector (a stress variant's) stays as it is; so does one that has not two layers of
    its own around it.
    """
    graph = model.graph
    by_name = {node.name: node for node in graph.node}
    count = 0
    for place in find_places(graph, tuple(weighted_layers(graph))):
        if place.gate is None:
            continue
        index, gate = GraphIndex(graph), by_name[place.gate]
        hidden, name = sorted(gate.input, key=lambda entry: entry in index.initializers)
        constant, sigmoid = index.constant(name), index.only_consumer(gate.output[0])
        if sigmoid is None or constant.size != 1 or not constant.item() > 0:
            continue
        apply_scale(graph, place, np.full(place.width, 1 / constant.item(), np.float32))
        sigmoid.input[0] = hidden
        count += 1
    if count:
        drop_unused(graph)  # the gates
    return count
