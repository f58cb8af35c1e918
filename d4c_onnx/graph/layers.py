"""The weighted layers of an encoder: every MatMul, Gemm and Conv that multiplies activations with a constant."""

from dataclasses import dataclass

import numpy as np
import onnx

from d4c_onnx.graph.index import GraphIndex, attribute

WEIGHTED_OPS = ("MatMul", "Gemm", "Conv")
# onnxruntime's own product of integers with a float result; quantised files may hold it
INTEGER_PRODUCT = "MatMulIntegerToFloat"
STORED_OPS = (*WEIGHTED_OPS, INTEGER_PRODUCT)


@dataclass(frozen=True, slots=True)
class WeightedLayer:
    """One weighted node.

    Attributes:
        node: its name.
        op: MatMul, Gemm or Conv.
        weight: the initialiser (or, in a quantised file, the value that reaches the node) of the weight.
        data: the activation input.
        output: the node's output.
        channel_axis: the weight's output-channel axis.
        first: reached from a float graph input without passing another weighted layer.
        last: a graph output is reached without passing another weighted layer.
    """

    node: str
    op: str
    weight: str
    data: str
    output: str
    channel_axis: int
    first: bool
    last: bool


@dataclass(frozen=True, slots=True)
class LinearSource:
    """A weighted layer and the bias added to it: what makes a value's channels."""

    layer: WeightedLayer
    bias: str | None


def weighted_layers(graph: onnx.GraphProto) -> list[WeightedLayer]:
    """All weighted layers of a float graph in graph order.

    A weight is an initialiser of two or more dimensions (a Conv's of three or more).
    """
    index = GraphIndex(graph)
    nodes = {node.name: weight for node in graph.node if (weight := _weight_input(index, node)) is not None}
    floats = {
        value.name
        for value in graph.input
        if value.name in index.inputs and value.type.tensor_type.elem_type == onnx.TensorProto.FLOAT
    }
    after = _reach_forward(index, floats, set(nodes))
    before = _reach_backward(index, set(index.outputs), set(nodes))
    layers = []
    for node in graph.node:
        if node.name in nodes:
            position = nodes[node.name]
            data, weight = node.input[1 - position], node.input[position]
            axis = _channel_axis(node, len(index.initializers[weight].dims), position)
            layers.append(
                WeightedLayer(
                    node.name, node.op_type, weight, data, node.output[0], axis, node.name in after, node.name in before
                )
            )
    return layers


def linear_source(index: GraphIndex, by_node: dict[str, WeightedLayer], value: str) -> LinearSource | None:
    """The weighted layer (and its bias) that makes `value`; None where something else does."""
    node = index.producer.get(value)
    if node is None:
        return None
    if node.name in by_node and is_plain(index, by_node[node.name]):
        bias = node.input[2] if node.op_type == "Gemm" and len(node.input) > 2 else None
        return LinearSource(by_node[node.name], bias or None)
    if node.op_type != "Add":
        return None
    for position in (0, 1):
        tensor = index.initializers.get(node.input[position])
        inner = index.producer.get(node.input[1 - position])
        if tensor is not None and len(tensor.dims) == 1 and inner is not None and inner.name in by_node:
            layer = by_node[inner.name]
            alone = inner.op_type == "MatMul" and index.only_consumer(inner.output[0]) is node
            return LinearSource(layer, tensor.name) if alone and is_plain(index, layer) else None
    return None


def added_constant(index: GraphIndex, value: str) -> tuple[onnx.NodeProto, str] | None:
    """The Add that alone reads `value`, and the constant of one axis that it adds; None where there is no such."""
    add = index.only_consumer(value)
    for name in add.input if add is not None and add.op_type == "Add" else ():
        tensor = index.initializers.get(name)
        if add is not None and tensor is not None and len(tensor.dims) == 1:
            return add, name
    return None


def is_plain(index: GraphIndex, layer: WeightedLayer) -> bool:
    """x W with one matrix W on the right: the last axis of what goes in and out are the channels."""
    node = index.producer[layer.output]
    matrix = len(index.initializers[layer.weight].dims) == 2
    return layer.op != "Conv" and node.input[0] == layer.data and matrix and not attribute(node, "transA", 0)


def _weight_input(index: GraphIndex, node: onnx.NodeProto) -> int | None:
    if node.op_type not in WEIGHTED_OPS:
        return None
    for position in (1, 0) if node.op_type == "MatMul" else (1,):
        tensor = index.initializers.get(node.input[position])
        if tensor is not None and len(tensor.dims) >= 2:
            return position
    return None


def _channel_axis(node: onnx.NodeProto, rank: int, position: int) -> int:
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    return rank - 1 if position == 1 else rank - 2


def _reach_forward(index: GraphIndex, start: set[str], weighted: set[str]) -> set[str]:
    found, queue, seen = set(), list(start), set(start)
    while queue:
        for node in index.consumers.get(queue.pop(), []):
            if node.name in weighted:
                found.add(node.name)
                continue
            if node.op_type in ("Shape", "Size"):  # the batch size is not data
                continue
            for name in node.output:
                if name not in seen:
                    seen.add(name)
                    queue.append(name)
    return found


def _reach_backward(index: GraphIndex, start: set[str], weighted: set[str]) -> set[str]:
    found, queue, seen = set(), list(start), set(start)
    while queue:
        node = index.producer.get(queue.pop())
        if node is None:
            continue
        if node.name in weighted:
            found.add(node.name)
            continue
        for name in node.input:
            if name and name not in seen:
                seen.add(name)
                queue.append(name)
    return found


def channels_first(weight: np.ndarray, axis: int) -> np.ndarray:
    """Normalise a weight to [channels, everything else]; the inverse is `channels_back`."""
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def channels_back(rows: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Undo `channels_first` for a weight of the given shape."""
    moved = (shape[axis], *(size for position, size in enumerate(shape) if position != axis))
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))
