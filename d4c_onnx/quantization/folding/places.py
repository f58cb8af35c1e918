"""Where a channel scale can be absorbed exactly: the rewrites that smoothing may use.

A weighted layer multiplies an activation x with W. For any positive vector s, W x = (W diag(s)) (x / s): the layer's
columns take s, and whatever makes x must take 1 / s. That is exact where x is made by

- a LayerNorm: its scale and bias are divided by s. q, k and v read one LayerNorm, so they share one s;
- attention's mix of values (out_proj): row j of v's weight and bias is divided by s_j. Softmax weights mix rows of the
  sequence, never channels, so the channel keeps its scale through the mix;
- QuickGELU, h sigmoid(1.702 h), after a linear layer (c_proj): row j of c_fc is divided by s_j and the constant in the
  sigmoid becomes 1.702 s_j, since (h / s) sigmoid(1.702 s (h / s)) = QuickGELU(h) / s;
- any other activation, SiLU too: an elementwise Mul by 1 / s behind it, one more pass over the values;
- such a Mul that is there already: its constant is divided by s.

Dividing the rows of a layer that is itself quantised changes nothing for it: its grid is per row.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import helper

from d4c_onnx.graph.index import GraphIndex, attribute, set_initializer
from d4c_onnx.graph.layers import LinearSource, WeightedLayer, channels_back, channels_first, is_plain, linear_source

_ACTIVATIONS = ("Gelu", "QuickGelu", "Relu")


@dataclass(frozen=True, slots=True)
class Place:
    """An activation whose channels can be rescaled exactly.

    Attributes:
        kind: layer_norm, value, quick_gelu, mul, or activation.
        node: name of the node that makes the activation.
        output: the activation.
        width: its channels.
        shrunk: initialisers that are divided by the scale, each with the axis of its channels.
        gate: QuickGELU's node that multiplies by the constant inside the sigmoid.
        consumers: the layers that read the activation.
    """

    kind: str
    node: str
    output: str
    width: int
    shrunk: tuple[tuple[str, int], ...]
    gate: str | None
    consumers: tuple[WeightedLayer, ...]


def find_places(graph: onnx.GraphProto, layers: tuple[WeightedLayer, ...]) -> list[Place]:
    """All places of a graph, in graph order.

    Left out: an activation that something else than a MatMul or Gemm reads (or the graph gives out), and parameters
    that several nodes share.
    """
    index = GraphIndex(graph)
    by_node = {layer.node: layer for layer in layers}
    found = []
    for name in dict.fromkeys(layer.data for layer in layers):
        readers = index.consumers.get(name, [])
        consumers = tuple(by_node[reader.name] for reader in readers if reader.name in by_node)
        exact = (
            len(consumers) == len(readers)
            and name not in index.outputs
            and all(is_plain(index, layer) and _owned(index, layer.weight) for layer in consumers)
        )
        node = index.producer.get(name)
        if exact and node is not None:
            width = index.initializers[consumers[0].weight].dims[1 - consumers[0].channel_axis]
            absorber = _absorber(index, by_node, node, width)
            if absorber is not None:
                kind, shrunk, gate = absorber
                found.append(Place(kind, node.name, name, width, shrunk, gate, consumers))
    return found


def apply_scale(graph: onnx.GraphProto, place: Place, scale: np.ndarray) -> None:
    """Divide the activation's channels by `scale`, float32 [width], in place; the encoder's output stays the same."""
    index = GraphIndex(graph)
    for name, axis in place.shrunk:
        values = index.constant(name)
        line = scale.reshape([-1 if position == axis % values.ndim else 1 for position in range(values.ndim)])
        set_initializer(graph, name, (values / line).astype(np.float32))
    if place.gate is not None:
        _scale_gate(graph, index, place, scale)
    if place.kind == "activation":
        _insert_mul(graph, index, place, scale)
    for layer in place.consumers:
        weight = index.constant(layer.weight)
        rows = channels_first(weight, layer.channel_axis) * scale
        set_initializer(graph, layer.weight, channels_back(rows.astype(np.float32), weight.shape, layer.channel_axis))


def through_heads(index: GraphIndex, value: str) -> str | None:
    """Back from a per-head value [batch, heads, length, d] to the [batch, length, width] it was split from.

    None when something else reads a value on the way.
    """
    while (node := index.producer.get(value)) is not None and node.op_type in ("Transpose", "Reshape"):
        if index.only_consumer(value) is None:
            return None
        value = node.input[0]
    return value


# kind, shrunk, gate: see `Place`
_Absorber = tuple[str, tuple[tuple[str, int], ...], str | None]


def _absorber(
    index: GraphIndex, by_node: dict[str, WeightedLayer], node: onnx.NodeProto, width: int
) -> _Absorber | None:
    """How the activation that `node` makes takes 1 / s."""
    if node.op_type == "LayerNormalization":
        parameters = [entry for entry in node.input[1:] if entry]
        if all(_owned(index, entry) and _lengths(index, entry) == (width,) for entry in parameters):
            return "layer_norm", tuple((entry, 0) for entry in parameters), None
    elif node.op_type == "Reshape":
        source = _value_source(index, by_node, node)
        if source is not None and _owned_source(index, source, width):
            return "value", _rows_of(source), None
    elif node.op_type == "Mul":
        for entry in node.input:
            if _lengths(index, entry) == (width,) and _owned(index, entry):
                return "mul", ((entry, 0),), None
        gate = _quick_gelu_gate(index, node)
        hidden = next((entry for entry in gate.input if entry in node.input), "") if gate is not None else ""
        source = linear_source(index, by_node, hidden)
        alone = len(index.consumers[hidden]) == 2 and hidden not in index.outputs
        if gate is not None and source is not None and alone:
            return ("quick_gelu", _rows_of(source), gate.name) if _owned_source(index, source, width) else None
        if _is_silu(index, node):
            return "activation", (), None
    elif node.op_type in _ACTIVATIONS:
        return "activation", (), None
    return None


def _value_source(index: GraphIndex, by_node: dict[str, WeightedLayer], node: onnx.NodeProto) -> LinearSource | None:
    """v of MatMul(softmax, v) -> Transpose(0, 2, 1, 3) -> Reshape: heads side by side, in the order of v's rows."""
    merged = index.producer.get(node.input[0])
    if merged is None or merged.op_type != "Transpose" or attribute(merged, "perm") != [0, 2, 1, 3]:
        return None
    mix = index.producer.get(merged.input[0])
    if mix is None or mix.op_type != "MatMul" or index.only_consumer(mix.output[0]) is not merged:
        return None
    weights, split = (index.producer.get(entry) for entry in mix.input)
    if weights is None or weights.op_type != "Softmax" or split is None or attribute(split, "perm") != [0, 2, 1, 3]:
        return None
    value = through_heads(index, mix.input[1])
    return linear_source(index, by_node, value) if value and index.only_consumer(value) else None


def _sigmoids(index: GraphIndex, node: onnx.NodeProto) -> Iterator[tuple[str, onnx.NodeProto]]:
    """The h and the Sigmoid of h * Sigmoid(...), when `node` is that product."""
    for hidden, gated in (tuple(node.input), tuple(reversed(node.input))):
        sigmoid = index.producer.get(gated)
        if sigmoid is not None and sigmoid.op_type == "Sigmoid" and index.only_consumer(gated) is node:
            yield hidden, sigmoid


def _quick_gelu_gate(index: GraphIndex, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The `Mul(h, constant)` of h * Sigmoid(constant * h), when `node` is its outer product."""
    for hidden, sigmoid in _sigmoids(index, node):
        gate = index.producer.get(sigmoid.input[0])
        if gate is not None and gate.op_type == "Mul" and index.only_consumer(gate.output[0]) is sigmoid:
            constant = [entry for entry in gate.input if entry in index.initializers]
            if len(constant) == 1 and hidden in gate.input:
                return gate
    return None


def _is_silu(index: GraphIndex, node: onnx.NodeProto) -> bool:
    """Whether `node`, a Mul, is the outer product of h * Sigmoid(h): what `gates` leaves of QuickGELU."""
    return any(sigmoid.input[0] == hidden for hidden, sigmoid in _sigmoids(index, node))


def _scale_gate(graph: onnx.GraphProto, index: GraphIndex, place: Place, scale: np.ndarray) -> None:
    gate = next(node for node in graph.node if node.name == place.gate)
    position = next(number for number, entry in enumerate(gate.input) if entry in index.initializers)
    constant = np.broadcast_to(index.constant(gate.input[position]), scale.shape)
    own = f"{place.output}_gate"  # exporters share one 1.702 among all blocks
    set_initializer(graph, own, (constant * scale).astype(np.float32))
    gate.input[position] = own


def _insert_mul(graph: onnx.GraphProto, index: GraphIndex, place: Place, scale: np.ndarray) -> None:
    shrunk, constant = f"{place.output}_smoothed", f"{place.output}_smoothing"
    set_initializer(graph, constant, (1 / scale).astype(np.float32))
    for reader in index.consumers[place.output]:
        for position, entry in enumerate(reader.input):
            if entry == place.output:
                reader.input[position] = shrunk
    position = next(number for number, node in enumerate(graph.node) if node.name == place.node)
    graph.node.insert(position + 1, helper.make_node("Mul", [place.output, constant], [shrunk], name=shrunk))


def _rows_of(source: LinearSource) -> tuple[tuple[str, int], ...]:
    weight = (source.layer.weight, source.layer.channel_axis)
    return (weight,) if source.bias is None else (weight, (source.bias, 0))


def _owned_source(index: GraphIndex, source: LinearSource, width: int) -> bool:
    names = [name for name, _ in _rows_of(source)]
    fits = source.bias is None or _lengths(index, source.bias) == (width,)
    dims = index.initializers[source.layer.weight].dims
    return fits and dims[source.layer.channel_axis] == width and all(_owned(index, name) for name in names)


def _owned(index: GraphIndex, name: str) -> bool:
    return name in index.initializers and len(index.consumers[name]) == 1


def _lengths(index: GraphIndex, name: str) -> tuple[int, ...] | None:
    tensor = index.initializers.get(name)
    return None if tensor is None else tuple(tensor.dims)
