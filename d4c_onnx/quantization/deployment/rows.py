"""The last block computes the pooled row only.

A CLIP tower reads one token of its last block: the class token, or the end token. Every other row of that block is only
needed as a key and a value. So the row is selected before the block's query, and all that follows (scores, output
projection, residuals, LayerNorms, MLP) runs for one token instead of all. Exact: each of these steps works row by
row. In ViT-B/32 this is 7 % of all multiplications.
"""

import numpy as np
import onnx
from onnx import helper

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, replace_nodes, set_initializer
from d4c_onnx.quantization.deployment.pattern import Heads, find_attention, mask_axes

# Operators that give row r of their output from row r of their inputs alone, for [batch, row, width] and constants.
_ROW_WISE = ("Add", "Mul", "Sigmoid", "Gelu", "Erf", "Div", "Relu", "Clip", "QuantizeLinear", "DequantizeLinear")

_SUFFIX = "_pooled"


class _NotRowWise(Exception):
    """Something between the last attention and the pooling looks at other rows."""


def compute_pooled_row_only(model: onnx.ModelProto) -> bool:
    """Rewrite the last block of a transformer in place; False (and nothing changed) where its form is another.

    Args:
        model: a float or QDQ encoder that pools by `Gather` (image) or `GatherElements` (text) along axis 1.
    """
    index = GraphIndex(model.graph)
    pool = next((node for node in reversed(model.graph.node) if _pools(index, node)), None)
    if pool is None:
        return False
    before = _ancestors(index, [pool.input[0]])
    softmaxes = [node for node in model.graph.node if node.op_type == "Softmax" and node.output[0] in before]
    heads = find_attention(index, softmaxes[-1]) if softmaxes else None
    if heads is None:
        return False
    try:
        _Rewrite(model, index, pool, heads).run()
    except _NotRowWise:
        return False
    return True


def _pools(index: GraphIndex, node: onnx.NodeProto) -> bool:
    if node.op_type not in ("Gather", "GatherElements") or attribute(node, "axis", 0) != 1:
        return False
    if node.op_type == "Gather":
        position = index.array(node.input[1])
        return position is not None and position.ndim == 0
    return _end_positions(index, node.input[1]) is not None


def _end_positions(index: GraphIndex, name: str) -> str | None:
    """The ArgMax [batch] behind the index [batch, 1, width] of a text tower's pooling."""
    for op in ("Expand", "Unsqueeze"):
        maker = index.producer.get(name)
        if maker is None or maker.op_type != op:
            return None
        name = maker.input[0]
    maker = index.producer.get(name)
    return name if maker is not None and maker.op_type == "ArgMax" else None


def _ancestors(index: GraphIndex, names: list[str]) -> set[str]:
    found, queue = set(names), list(names)
    while queue:
        maker = index.producer.get(queue.pop())
        for name in maker.input if maker is not None else ():
            if name and name not in found:
                found.add(name)
                queue.append(name)
    return found


class _Rewrite:
    def __init__(self, model: onnx.ModelProto, index: GraphIndex, pool: onnx.NodeProto, heads: Heads) -> None:
        self._graph, self._index, self._pool, self._heads = model.graph, index, pool, heads
        self._whole = _ancestors(index, [heads.key, heads.value])  # what is needed of every row
        self._new: list[onnx.NodeProto] = []
        self._constants: dict[str, np.ndarray] = {}
        self._done: dict[str, str] = {}

    def run(self) -> None:
        """Build the new nodes first, so that a graph that cannot be rewritten stays untouched."""
        row = self._select(self._pool.input[0])
        if self._pool.op_type == "Gather":
            axes = self._constant("pooled_row_axis", np.array([1], np.int64))
            last = helper.make_node("Squeeze", [row, axes], [self._pool.output[0]], name="pooled_row_squeeze")
        else:
            last = helper.make_node("Identity", [row], [self._pool.output[0]], name="pooled_row_identity")
        self._new.append(last)
        for name, values in self._constants.items():
            set_initializer(self._graph, name, values)
        nodes: list[onnx.NodeProto] = []
        for node in self._graph.node:
            nodes += self._new if node.name == self._pool.name else [node]
        replace_nodes(self._graph, nodes)
        drop_unused(self._graph)
        names = {node.name for node in self._graph.node}
        for node in self._graph.node:  # a layer keeps its name: the original is gone
            name = node.name.removesuffix(_SUFFIX)
            if name not in names:
                node.name = name

    def _select(self, name: str) -> str:
        """The value that holds the pooled row of `name`: [batch, 1, width]."""
        if name not in self._done:
            self._done[name] = self._make(name)
        return self._done[name]

    def _make(self, name: str) -> str:
        maker = self._index.producer.get(name)
        if name in self._whole:
            if maker is not None and maker.op_type == "DequantizeLinear":  # select integers: the pair must stay a pair
                return self._clone(maker, {0: self._cut(maker.input[0])})
            return self._cut(name)
        if maker is None:
            raise _NotRowWise
        if name == self._heads.join[1].output[0]:
            return self._attend()
        if maker.op_type == "MatMul":
            if not self._is_constant(maker.input[1]):
                raise _NotRowWise
            return self._clone(maker, {0: self._select(maker.input[0])})
        layer_norm = maker.op_type == "LayerNormalization" and attribute(maker, "axis", -1) in (-1, 2)
        if not layer_norm and maker.op_type not in _ROW_WISE:
            raise _NotRowWise
        inputs = {}
        for position, entry in enumerate(maker.input):
            if entry and not self._is_constant(entry):
                inputs[position] = self._select(entry)
            elif entry and self._has_rows(entry):
                raise _NotRowWise
        return self._clone(maker, inputs)

    def _attend(self) -> str:
        """Scores, softmax and mixture of the one query."""
        heads = self._heads
        depth = heads.width // heads.heads
        split = self._constant("pooled_row_split", np.array([-1, 1, heads.heads, depth], np.int64))
        join = self._constant("pooled_row_join", np.array([-1, 1, heads.width], np.int64))
        query = self._clone(heads.split[0], {0: self._select(heads.query), 1: split})
        query = self._clone(heads.split[1], {0: query})
        scores = self._clone(heads.scores, {0: query})
        if heads.mask is not None:
            added = self._index.producer[heads.softmax.input[0]]
            position = list(added.input).index(heads.mask)
            scores = self._clone(added, {1 - position: scores, position: self._mask_row(heads.mask)})
        mixed = self._clone(heads.mixed, {0: self._clone(heads.softmax, {0: scores})})
        return self._clone(heads.join[1], {0: self._clone(heads.join[0], {0: mixed}), 1: join})

    def _cut(self, name: str) -> str:
        """The pooling, moved here."""
        if name in self._done:
            return self._done[name]
        result = self._done[name] = f"{name}_pooled"
        if self._pool.op_type == "Gather":
            position = self._position()
            node = helper.make_node("Gather", [name, position], [result], name=f"{result}_gather", axis=1)
        else:
            inputs = [name, self._pool.input[1]]
            node = helper.make_node("GatherElements", inputs, [result], name=f"{result}_gather", axis=1)
        self._new.append(node)
        return result

    def _mask_row(self, mask: str) -> str:
        """[length, length] -> [batch or 1, 1, 1, length]; one for each text and head keeps its axes."""
        end = None if self._pool.op_type == "Gather" else _end_positions(self._index, self._pool.input[1])
        row, result = f"{mask}_row", f"{mask}_pooled"
        known = mask_axes(self._index, mask)
        if known == 4 and end is None:
            inputs = [mask, self._position()]
            self._new.append(helper.make_node("Gather", inputs, [result], name=f"{result}_gather", axis=2))
            return result
        if known != 2:
            raise _NotRowWise
        axes = self._constant("pooled_row_mask_axes", np.array([1, 2], np.int64))
        self._new.append(
            helper.make_node("Gather", [mask, end or self._position()], [row], name=f"{row}_gather", axis=0)
        )
        self._new.append(helper.make_node("Unsqueeze", [row, axes], [result], name=f"{result}_axes"))
        return result

    def _position(self) -> str:
        position = self._index.constant(self._pool.input[1]).reshape(1).astype(np.int64)
        return self._constant("pooled_row", position)

    def _constant(self, name: str, values: np.ndarray) -> str:
        self._constants[name] = values
        return name

    def _is_constant(self, name: str) -> bool:
        """An initialiser, or a weight on its way out of one."""
        while name not in self._index.initializers:
            maker = self._index.producer.get(name)
            if maker is None or maker.op_type not in ("DequantizeLinear", "Cast"):
                return False
            name = maker.input[0]
        return True

    def _has_rows(self, name: str) -> bool:
        """Whether a constant differs from row to row (a positional embedding)."""
        tensor = self._index.initializers.get(name)
        return tensor is not None and len(tensor.dims) > 1 and tensor.dims[-2] != 1

    def _clone(self, node: onnx.NodeProto, inputs: dict[int, str]) -> str:
        twin = onnx.NodeProto()
        twin.CopyFrom(node)
        twin.name = f"{node.name}{_SUFFIX}"
        for position, name in inputs.items():
            twin.input[position] = name
        twin.output[0] = f"{node.output[0]}_pooled"
        self._new.append(twin)
        return str(twin.output[0])
