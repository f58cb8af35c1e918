"""The weighted layers of an encoder: every MatMul, Gemm and Conv that multiplies activations with a constant."""

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.values import (
    attribute,
    dims,
    inside,
    is_constant,
    is_op,
    maker,
    name_of,
    only_reader,
    readers,
    reads,
    replace_input,
)
from d4c_onnx.graph.values import node as new_node

WEIGHTED_OPS = ("MatMul", "Gemm", "Conv")


@dataclass(frozen=True, slots=True)
class WeightedLayer:
    """One weighted node, by the names that it keeps through quantisation.

    Attributes:
        node: its name.
        op: MatMul, Gemm or Conv.
        weight: the initialiser of the weight.
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
    """A weighted node and the bias added to it: what makes a value's channels."""

    node: ir.Node
    weight: ir.Value
    channel_axis: int
    bias: ir.Value | None


def weighted_layers(graph: ir.Graph) -> list[WeightedLayer]:
    """All weighted layers of a float graph in graph order.

    A weight is an initialiser of two or more dimensions (a Conv's of three or more).
    """
    weighted = {node: position for node in graph if (position := weight_position(node)) is not None}
    floats = [value for value in graph.inputs if value.dtype == ir.DataType.FLOAT and not value.is_initializer()]
    # who reads a value inside a branch of an If reads it for the If
    owners = {inner: node for node in graph for inner in inside(node)}
    after = _reach_forward(floats, weighted, owners)
    before = _reach_backward(list(graph.outputs), weighted)
    return [
        WeightedLayer(
            node.name or "",
            node.op_type,
            name_of(_input(node, position)),
            name_of(_input(node, 1 - position)),
            name_of(node.outputs[0]),
            channel_axis(node),
            node in after,
            node in before,
        )
        for node, position in weighted.items()
    ]


def weight_position(node: ir.Node) -> int | None:
    """Which input of a MatMul, Gemm or Conv is its constant weight; None where none is."""
    if not is_op(node, *WEIGHTED_OPS):
        return None
    for position in (1, 0) if node.op_type == "MatMul" else (1,):
        shape = dims(node.inputs[position])
        if shape is not None and len(shape) >= 2:
            return position
    return None


def channel_axis(node: ir.Node) -> int:
    """The output-channel axis of a weighted node's weight."""
    position = weight_position(node)
    if node.op_type == "Conv":
        return 0
    if node.op_type == "Gemm":
        return 0 if attribute(node, "transB", 0) else 1
    rank = len(dims(node.inputs[position or 0]) or ())
    return rank - 1 if position == 1 else rank - 2


def is_plain(node: ir.Node) -> bool:
    """x W with one matrix W on the right: the last axis of what goes in and out are the channels."""
    if weight_position(node) != 1 or node.op_type == "Conv" or attribute(node, "transA", 0):
        return False
    return len(dims(node.inputs[1]) or ()) == 2


def linear_source(value: ir.Value | None) -> LinearSource | None:
    """The plain weighted node (and its bias) that makes `value`; None where something else does."""
    node = maker(value)
    if node is None:
        return None
    if is_plain(node):
        bias = node.inputs[2] if node.op_type == "Gemm" and len(node.inputs) > 2 else None
        return LinearSource(node, _input(node, 1), channel_axis(node), bias)
    if not is_op(node, "Add"):
        return None
    for position in (0, 1):
        bias, inner = node.inputs[position], maker(node.inputs[1 - position])
        if is_constant(bias) and len(dims(bias) or ()) == 1 and is_op(inner, "MatMul") and inner is not None:
            alone = only_reader(inner.outputs[0]) is node and is_plain(inner)
            return LinearSource(inner, _input(inner, 1), channel_axis(inner), bias) if alone else None
    return None


def added_constant(value: ir.Value) -> tuple[ir.Node, ir.Value] | None:
    """The Add that alone reads `value`, and the constant of one axis that it adds; None where there is no such."""
    add = only_reader(value)
    for entry in add.inputs if add is not None and is_op(add, "Add") else ():
        if add is not None and entry is not None and len(dims(entry) or ()) == 1:
            return add, entry
    return None


def with_bias(product: ir.Node) -> ir.Value:
    """The product with its bias, which onnxruntime fuses with the integer product."""
    biased = added_constant(product.outputs[0])
    return product.outputs[0] if biased is None else biased[0].outputs[0]


def add_beside(graph: ir.Graph, product: ir.Node, other: ir.Node, value: str, name: str) -> None:
    """Add what another node makes, which is put into the graph, to a product with its bias.

    Args:
        value, name: the sum's, and of the node that makes it.
    """
    total = with_bias(product)
    made = total.producer()
    assert made is not None
    whole = new_node("Add", [total, other.outputs[0]], value, name=name)
    for user in readers(total):
        if user is not whole:
            replace_input(user, total, whole.outputs[0])
    graph.insert_after(made, [other, whole])


def _input(node: ir.Node, position: int) -> ir.Value:
    value = node.inputs[position]
    assert value is not None
    return value


def _reach_forward(start: list[ir.Value], weighted: dict[ir.Node, int], owners: dict[ir.Node, ir.Node]) -> set[ir.Node]:
    found, queue, seen = set(), list(start), set(start)
    while queue:
        for node in (owners.get(reader, reader) for reader in readers(queue.pop())):
            if node in weighted:
                found.add(node)
                continue
            if is_op(node, "Shape", "Size"):  # the batch size is not data
                continue
            fresh = [value for value in node.outputs if value not in seen]
            seen.update(fresh)
            queue.extend(fresh)
    return found


def _reach_backward(start: list[ir.Value], weighted: dict[ir.Node, int]) -> set[ir.Node]:
    found, queue, seen = set(), list(start), set(start)
    while queue:
        node = queue.pop().producer()
        if node is None:
            continue
        if node in weighted:
            found.add(node)
            continue
        fresh = [value for value in dict.fromkeys(reads(node)) if value not in seen]
        seen.update(fresh)
        queue.extend(fresh)
    return found


def channels_first(weight: np.ndarray, axis: int) -> np.ndarray:
    """Normalise a weight to [channels, everything else]; the inverse is `channels_back`."""
    return np.moveaxis(weight, axis, 0).reshape(weight.shape[axis], -1)


def channels_back(rows: np.ndarray, shape: tuple[int, ...], axis: int) -> np.ndarray:
    """Undo `channels_first` for a weight of the given shape."""
    moved = (shape[axis], *(size for position, size in enumerate(shape) if position != axis))
    return np.ascontiguousarray(np.moveaxis(rows.reshape(moved), 0, axis))
