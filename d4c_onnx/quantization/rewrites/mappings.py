"""Where a channel scale can be absorbed exactly: the mappings that smoothing may use.

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

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.attention import Attention, find_attentions
from d4c_onnx.graph.gates import is_silu, quick_gelu_gate
from d4c_onnx.graph.layers import (
    LinearSource,
    WeightedLayer,
    channels_back,
    channels_first,
    is_plain,
    linear_source,
)
from d4c_onnx.graph.values import (
    CONTRIB,
    constant,
    dims,
    is_constant,
    is_op,
    maker,
    name_of,
    node,
    nodes_by_name,
    only_reader,
    readers,
    set_constant,
    values_by_name,
)

_ACTIVATIONS = ("Gelu", f"{CONTRIB}:QuickGelu", "Relu")


@dataclass(frozen=True, slots=True)
class Absorber:
    """What takes 1 / s in front of an activation.

    Attributes:
        kind: layer_norm, value, quick_gelu, mul, or activation.
        shrunk: initialisers that are divided by the scale, each with the axis of its channels.
        gate: QuickGELU's node that multiplies by the constant inside the sigmoid.
    """

    kind: str
    shrunk: tuple[tuple[ir.Value, int], ...] = ()
    gate: ir.Node | None = None


@dataclass(frozen=True, slots=True)
class SmoothingMapping:
    """An activation whose channels can be rescaled exactly.

    Attributes:
        node: the node that makes the activation.
        output: the activation.
        width: its channels.
        absorber: what is divided by the scale.
        consumers: the layers that read the activation, whose weights are multiplied by it.
    """

    node: ir.Node
    output: ir.Value
    width: int
    absorber: Absorber
    consumers: tuple[WeightedLayer, ...]

    @property
    def kind(self) -> str:
        """The absorber's."""
        return self.absorber.kind


def find_mappings(graph: ir.Graph, layers: Sequence[WeightedLayer]) -> list[SmoothingMapping]:
    """All mappings of a graph, in graph order.

    Left out: an activation that something else than a MatMul or Gemm reads (or the graph gives out), and parameters
    that several nodes share.
    """
    by_node, values = {layer.node: layer for layer in layers}, values_by_name(graph)
    attentions = {found.output: found for found in find_attentions(graph)[0]}
    found = []
    for name in dict.fromkeys(layer.data for layer in layers):
        value = values[name]
        reading = readers(value)
        exact = not value.is_graph_output() and all(
            reader.name in by_node and is_plain(reader) and _owned(reader.inputs[1]) for reader in reading
        )
        made = maker(value)
        if exact and made is not None and len(list(value.uses())) == len(reading):
            consumers = tuple(by_node[reader.name or ""] for reader in reading)
            width = (dims(reading[0].inputs[1]) or ())[1 - consumers[0].channel_axis]
            absorber = _absorber(made, width, attentions)
            if absorber is not None:
                found.append(SmoothingMapping(made, value, width, absorber, consumers))
    return found


def apply_scale(graph: ir.Graph, mapping: SmoothingMapping, scale: np.ndarray) -> None:
    """Divide the activation's channels by `scale`, float32 [width], in place; the encoder's output stays the same."""
    for value, axis in mapping.absorber.shrunk:
        values = constant(value)
        line = scale.reshape([-1 if position == axis % values.ndim else 1 for position in range(values.ndim)])
        set_constant(graph, name_of(value), (values / line).astype(np.float32))
    if mapping.absorber.gate is not None:
        _scale_gate(graph, mapping, mapping.absorber.gate, scale)
    if mapping.kind == "activation":
        _insert_mul(graph, mapping, scale)
    nodes = nodes_by_name(graph)
    for layer in mapping.consumers:
        weight = constant(nodes[layer.node].inputs[1])
        rows = channels_first(weight, layer.channel_axis) * scale
        columns = channels_back(rows.astype(np.float32), weight.shape, layer.channel_axis)
        set_constant(graph, layer.weight, columns)


def _absorber(made: ir.Node, width: int, attentions: dict[ir.Value, Attention]) -> Absorber | None:
    """How the activation that a node makes takes 1 / s."""
    if is_op(made, "LayerNormalization"):
        parameters = [entry for entry in made.inputs[1:] if entry is not None]
        if all(_owned(entry) and dims(entry) == (width,) for entry in parameters):
            return Absorber("layer_norm", tuple((entry, 0) for entry in parameters))
    elif made.outputs[0] in attentions:
        source = _value_source(attentions[made.outputs[0]])
        if source is not None and _owned_source(source, width):
            return Absorber("value", _rows_of(source))
    elif is_op(made, "Mul"):
        return _absorber_of_mul(made, width)
    elif is_op(made, *_ACTIVATIONS):
        return Absorber("activation")
    return None


def _absorber_of_mul(made: ir.Node, width: int) -> Absorber | None:
    for entry in made.inputs:
        if entry is not None and dims(entry) == (width,) and _owned(entry):
            return Absorber("mul", ((entry, 0),))
    gate = quick_gelu_gate(made)
    if gate is not None:
        hidden = next((entry for entry in gate.inputs if entry is not None and entry in made.inputs), None)
        source = linear_source(hidden)
        if source is not None and hidden is not None:
            alone = len(list(hidden.uses())) == 2 and not hidden.is_graph_output()
            if alone:
                return Absorber("quick_gelu", _rows_of(source), gate) if _owned_source(source, width) else None
    return Absorber("activation") if is_silu(made) else None


def _value_source(attention: Attention) -> LinearSource | None:
    """v of an attention, where nothing else reads it on its way: heads lie side by side in the order of v's rows."""
    shaped, turned = attention.value_split
    alone = all(only_reader(value) is not None for value in (attention.value, shaped.outputs[0], turned.outputs[0]))
    return linear_source(attention.value) if alone else None


def _scale_gate(graph: ir.Graph, mapping: SmoothingMapping, gate: ir.Node, scale: np.ndarray) -> None:
    position = next(number for number, entry in enumerate(gate.inputs) if is_constant(entry))
    values = np.broadcast_to(constant(gate.inputs[position]), scale.shape)
    # a constant of its own: exporters share one 1.702 among all blocks
    own = set_constant(graph, f"{name_of(mapping.output)}_gate", (values * scale).astype(np.float32))
    gate.replace_input_with(position, own)


def _insert_mul(graph: ir.Graph, mapping: SmoothingMapping, scale: np.ndarray) -> None:
    name = name_of(mapping.output)
    factor = set_constant(graph, f"{name}_smoothing", (1 / scale).astype(np.float32))
    mul = node("Mul", [mapping.output, factor], f"{name}_smoothed")
    mapping.output.replace_all_uses_with(mul.outputs[0])
    mul.replace_input_with(0, mapping.output)
    graph.insert_after(mapping.node, mul)


def _rows_of(source: LinearSource) -> tuple[tuple[ir.Value, int], ...]:
    weight = (source.weight, source.channel_axis)
    return (weight,) if source.bias is None else (weight, (source.bias, 0))


def _owned_source(source: LinearSource, width: int) -> bool:
    fits = source.bias is None or dims(source.bias) == (width,)
    shape = dims(source.weight) or ()
    return fits and shape[source.channel_axis] == width and all(_owned(value) for value, _ in _rows_of(source))


def _owned(value: ir.Value | None) -> bool:
    """Whether a value is a constant that one node alone reads."""
    return is_constant(value) and value is not None and len(list(value.uses())) == 1
