"""Who makes a value, who reads it, what constant it is: one index per graph, made anew after a rewrite."""

import contextlib
import copy
from collections import defaultdict
from collections.abc import Iterable, Iterator, Sequence

import numpy as np
import onnx
from onnx import numpy_helper


class GraphIndex:
    """Look-ups over an onnx GraphProto."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        self.graph = graph
        self.initializers = {tensor.name: tensor for tensor in graph.initializer}
        self.producer: dict[str, onnx.NodeProto] = {}
        self.consumers: dict[str, list[onnx.NodeProto]] = defaultdict(list)
        for node in graph.node:
            for name in node.output:
                self.producer[name] = node
            for name in node.input:
                if name:
                    self.consumers[name].append(node)
        self.outputs = {value.name for value in graph.output}
        self.inputs = {value.name for value in graph.input} - set(self.initializers)

    def array(self, name: str) -> np.ndarray | None:
        """An initialiser's values, or None."""
        tensor = self.initializers.get(name)
        return None if tensor is None else numpy_helper.to_array(tensor)

    def constant(self, name: str) -> np.ndarray:
        """An initialiser's values, where the graph is known to have it."""
        return numpy_helper.to_array(self.initializers[name])

    def only_consumer(self, name: str) -> onnx.NodeProto | None:
        """The one node that reads `name`, or None when there are several or it is a graph output."""
        readers = self.consumers.get(name, [])
        return readers[0] if len(readers) == 1 and name not in self.outputs else None


def attribute(node: onnx.NodeProto, name: str, default: object = None) -> object:
    """A node's attribute as a Python value."""
    for entry in node.attribute:
        if entry.name == name:
            return onnx.helper.get_attribute_value(entry)
    return default


def integers_attribute(node: onnx.NodeProto, name: str, count: int, default: int = 1) -> list[int]:
    """An attribute that is a list of `count` integers; all `default` where the node does not say."""
    found = attribute(node, name)
    return [int(value) for value in found] if isinstance(found, (list, tuple)) else [default] * count


def integer_attribute(node: onnx.NodeProto, name: str, default: int) -> int:
    """An integer attribute."""
    found = attribute(node, name)
    return found if isinstance(found, int) else default


def is_padded(node: onnx.NodeProto) -> bool:
    """Whether a two-dimensional Conv or pool reaches beyond the edges of its input."""
    chosen = attribute(node, "auto_pad", b"NOTSET") not in (b"NOTSET", b"VALID")
    return chosen or any(integers_attribute(node, "pads", 4, 0))


def set_initializer(graph: onnx.GraphProto, name: str, values: np.ndarray) -> None:
    """Replace (or add) an initialiser."""
    tensor = numpy_helper.from_array(np.ascontiguousarray(values), name)
    for entry in graph.initializer:
        if entry.name == name:
            entry.CopyFrom(tensor)
            return
    graph.initializer.append(tensor)


def replace_nodes(graph: onnx.GraphProto, nodes: Iterable[onnx.NodeProto]) -> None:
    """Make `nodes` the graph's nodes, in place; some may be its own, in another order or with others between."""
    kept = [copy.deepcopy(node) for node in nodes]  # deleting a field ends the life of what it holds
    del graph.node[:]
    graph.node.extend(kept)


def drop_unused(graph: onnx.GraphProto) -> int:
    """Remove nodes, initialisers and shape notes that no output needs; returns how many nodes."""
    needed = {value.name for value in graph.output}
    kept: list[onnx.NodeProto] = []
    for node in reversed(graph.node):
        if any(name in needed for name in node.output):
            needed.update(node.input)
            for name in _captured(node):
                needed.add(name)
            kept.append(node)
    removed = len(graph.node) - len(kept)
    del graph.node[:]
    graph.node.extend(reversed(kept))
    for field in (graph.initializer, graph.value_info):
        alive = [entry for entry in field if entry.name in needed]
        if len(alive) != len(field):
            del field[:]
            field.extend(alive)
    return removed


def _captured(node: onnx.NodeProto) -> Iterator[str]:
    for entry in node.attribute:
        if entry.type == onnx.AttributeProto.GRAPH:
            for inner in entry.g.node:
                yield from inner.input
                yield from _captured(inner)


@contextlib.contextmanager
def opened(model: onnx.ModelProto, names: Sequence[str]) -> Iterator[onnx.ModelProto]:
    """The model itself with the named float values for graph outputs; it gets its own back at the end."""
    own = [copy.deepcopy(value) for value in model.graph.output]
    del model.graph.output[:]
    for name in names:
        model.graph.output.append(onnx.helper.make_tensor_value_info(name, onnx.TensorProto.FLOAT, None))
    try:
        yield model
    finally:
        del model.graph.output[:]
        model.graph.output.extend(own)
