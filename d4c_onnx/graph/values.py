"""Small questions about values and nodes, and the few edits that every rewrite makes."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from typing import Any

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError

CONTRIB = "com.microsoft"
STANDARD = ("", "ai.onnx")  # domains of ONNX's own operators


def op_of(node: ir.Node) -> str:
    """A node's operator: `Add` of ONNX, `com.microsoft:Gelu` of onnxruntime's own."""
    return node.op_type if node.domain in STANDARD else f"{node.domain}:{node.op_type}"


def is_op(node: ir.Node | None, *names: str) -> bool:
    """Whether a node is one of these operators, named as in `op_of`."""
    return node is not None and op_of(node) in names


def array(value: ir.Value | None) -> np.ndarray | None:
    """An initialiser's values, or None where the value is computed, fed or absent."""
    if value is None or not value.is_initializer() or value.const_value is None:
        return None
    return np.asarray(value.const_value.numpy())


def constant(value: ir.Value | None) -> np.ndarray:
    """An initialiser's values, where the graph is known to have it.

    Raises:
        GraphError: it has not.
    """
    found = array(value)
    if found is None:
        raise GraphError(f"{value.name if value is not None else 'an input'}: is no constant, though it should be one.")
    return found


def is_constant(value: ir.Value | None) -> bool:
    """Whether a value is an initialiser, without looking at its values."""
    return value is not None and value.is_initializer() and value.const_value is not None


def dims(value: ir.Value | None) -> tuple[int, ...] | None:
    """The shape of an initialiser; None where the value is none."""
    if value is None or not is_constant(value) or value.const_value is None:
        return None
    return tuple(int(size) for size in value.const_value.shape.numpy())


def name_of(value: ir.Value) -> str:
    """A value's name; a loaded model has one for each."""
    return value.name or ""


def value_named(graph: ir.Graph, name: str) -> ir.Value:
    """An initialiser, input or node output of that name.

    Raises:
        GraphError: there is none.
    """
    found = graph.initializers.get(name) or values_by_name(graph).get(name)
    if found is None:
        raise GraphError(f"{name}: the graph has no such value.")
    return found


def values_by_name(graph: ir.Graph) -> dict[str, ir.Value]:
    """Every initialiser, input and node output of a graph (not of graphs inside it)."""
    computed = {name_of(value): value for node in graph for value in node.outputs}
    return {**graph.initializers, **{name_of(value): value for value in graph.inputs}, **computed}


def nodes_by_name(graph: ir.Graph) -> dict[str, ir.Node]:
    """Every node of a graph (not of graphs inside it)."""
    return {node.name or "": node for node in graph}


def maker(value: ir.Value | None) -> ir.Node | None:
    """The node that makes a value; None for inputs and initialisers."""
    return None if value is None else value.producer()


def readers(value: ir.Value) -> list[ir.Node]:
    """The nodes that read a value, each once; those inside If branches and loops, too."""
    return list(dict.fromkeys(use.node for use in value.uses()))


def reads(node: ir.Node) -> Iterator[ir.Value]:
    """What a node reads, and what the nodes of the graphs inside it read."""
    yield from (value for value in node.inputs if value is not None)
    for inner in inside(node):
        yield from (value for value in inner.inputs if value is not None)


def inside(node: ir.Node) -> Iterator[ir.Node]:
    """The nodes of the graphs inside a node (the branches of an If, the body of a loop), however deep."""
    for entry in node.attributes.values():
        graphs = [entry.value] if entry.type == ir.AttributeType.GRAPH else []
        for graph in entry.value if entry.type == ir.AttributeType.GRAPHS else graphs:
            for inner in graph:
                yield inner
                yield from inside(inner)


def only_reader(value: ir.Value) -> ir.Node | None:
    """The one node that reads `value`, once; None when there are several, or it is a graph output, or it stands inside
    a branch of an If: no rewrite can put a node of this graph in its place.
    """
    uses = list(value.uses())
    alone = len(uses) == 1 and not value.is_graph_output() and uses[0].node.graph is value.graph
    return uses[0].node if alone else None


def attribute(node: ir.Node, name: str, default: Any = None) -> Any:
    """A node's attribute as a Python value: a number, a string, a list or a graph."""
    found = node.attributes.get(name)
    if found is None:
        return default
    return list(found.value) if isinstance(found.value, (tuple, list)) else found.value


def integers(node: ir.Node, name: str, count: int, default: int = 1) -> list[int]:
    """An attribute that is a list of `count` integers; all `default` where the node does not say."""
    found = attribute(node, name)
    return [int(value) for value in found] if isinstance(found, list) else [default] * count


def is_padded(node: ir.Node) -> bool:
    """Whether a two-dimensional Conv or pool reaches beyond the edges of its input."""
    chosen = attribute(node, "auto_pad", "NOTSET") not in ("NOTSET", "VALID")
    return chosen or any(integers(node, "pads", 4, 0))


def set_constant(graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
    """The initialiser of that name, made or given these values; no other value of the graph may have the name."""
    return _store(graph, name, ir.Tensor(np.ascontiguousarray(values), name=name))


def set_scalar(graph: ir.Graph, name: str, number: float, dtype: type[np.generic] = np.int64) -> ir.Value:
    """As `set_constant`, with no axis; that one gives a number an axis of its own."""
    return _store(graph, name, ir.Tensor(np.array(number, dtype), name=name))


def _store(graph: ir.Graph, name: str, tensor: ir.Tensor) -> ir.Value:
    value = graph.initializers.get(name)
    if value is None:
        value = ir.Value(name=name, const_value=tensor)
        graph.register_initializer(value)
    value.const_value, value.dtype, value.shape = tensor, tensor.dtype, ir.Shape(tensor.shape)
    return value


def node(
    op: str,
    inputs: Iterable[ir.Value | None],
    output: str | Iterable[str | None],
    *,
    name: str | None = None,
    attributes: Mapping[str, Any] | None = None,
) -> ir.Node:
    """A new node, outputs named; `op` as in `is_op`; without a name of its own it takes its first output's."""
    domain, _, op_type = op.rpartition(":")
    names = [output] if isinstance(output, str) else list(output)
    outputs = [ir.Value(name=entry) if entry else ir.Value(name="") for entry in names]
    kept = {key: value for key, value in (attributes or {}).items() if value is not None}
    return ir.node(op_type, list(inputs), kept, domain=domain, outputs=outputs, name=name or names[0])


def insert_before(graph: ir.Graph, place: ir.Node, nodes: Iterable[ir.Node]) -> None:
    """Put nodes in front of another one."""
    graph.insert_before(place, list(nodes))


def prepend(graph: ir.Graph, nodes: Iterable[ir.Node]) -> None:
    """Put nodes in front of all others."""
    first, fresh = next(iter(graph), None), list(nodes)
    if first is None:
        graph.extend(fresh)
    elif fresh:
        graph.insert_before(first, fresh)


def take_over(old: ir.Value, new: ir.Value) -> None:
    """Let every reader of `old`, and the graph's outputs, have `new`; name, type and shape are the old value's."""
    name = old.name
    new.shape, new.type = old.shape, old.type
    old.replace_all_uses_with(new, replace_graph_outputs=True)
    old.name, new.name = f"{name}_replaced", name


def replace_input(reader: ir.Node, old: ir.Value, new: ir.Value) -> None:
    """Let one node read `new` wherever it reads `old`."""
    for position, value in enumerate(reader.inputs):
        if value is old:
            reader.replace_input_with(position, new)


def ancestors(values: Iterable[ir.Value | None]) -> set[ir.Value]:
    """Everything that values are made from, themselves included."""
    found: set[ir.Value] = set()
    queue = [value for value in values if value is not None]
    while queue:
        value = queue.pop()
        if value in found:
            continue
        found.add(value)
        made = value.producer()
        queue.extend(reads(made) if made is not None else ())
    return found


def walk_back(value: ir.Value | None, *through: str) -> ir.Value | None:
    """Back from a value through nodes of these operators, each by its first input, to what another node makes."""
    while value is not None and is_op(value.producer(), *through):
        made = value.producer()
        value = made.inputs[0] if made is not None else None
    return value


def nodes_of(graph: ir.Graph, *names: str) -> Iterator[ir.Node]:
    """The nodes of these operators; a list of them, so that the graph may change meanwhile."""
    return iter([entry for entry in graph if is_op(entry, *names)])


def use_contrib(model: ir.Model) -> None:
    """Declare onnxruntime's own operators, in place."""
    model.graph.opset_imports.setdefault(CONTRIB, 1)
