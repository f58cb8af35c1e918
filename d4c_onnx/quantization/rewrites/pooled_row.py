"""The last block computes the pooled row only.

A CLIP tower reads one token of its last block: the class token, or the end token. Every other row of that block is only
needed as a key and a value. So the row is selected before the block's query, and all that follows (scores, output
projection, residuals, LayerNorms, MLP) runs for one token instead of all. Exact: each of these steps works row by
row. In ViT-B/32 this is 7 % of all multiplications.
"""

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.attention import Attention, attention_of, mask_axes
from d4c_onnx.graph.values import (
    ancestors,
    array,
    attribute,
    constant,
    dims,
    insert_before,
    is_constant,
    is_op,
    maker,
    name_of,
    node,
    nodes_of,
    set_constant,
    take_over,
)
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite

# Operators that give row r of their output from row r of their inputs alone, for [batch, row, width] and constants.
_ROW_WISE = ("Add", "Sub", "Mul", "Sigmoid", "Gelu", "Erf", "Div", "Relu", "Clip", "QuantizeLinear", "DequantizeLinear")


class _NotRowWise(Exception):
    """Something between the last attention and the pooling looks at other rows; the message says what."""


def _compute(model: ir.Model) -> Result:
    """For a float or QDQ encoder that pools by `Gather` (image) or `GatherElements` (text) along axis 1."""
    pool = next(
        (entry for entry in reversed(list(nodes_of(model.graph, "Gather", "GatherElements"))) if _pools(entry)), None
    )
    if pool is None:
        return Result()
    before = ancestors([pool.inputs[0]])
    softmaxes = [entry for entry in nodes_of(model.graph, "Softmax") if entry.outputs[0] in before]
    if not softmaxes:
        return Result()
    attention = attention_of(softmaxes[-1])
    if isinstance(attention, Refusal):
        return Result(0, (attention,))
    try:
        _PooledRow(model.graph, pool, attention).run()
    except _NotRowWise as found:
        return Result(0, (Refusal(pool.name or "", str(found)),))
    return Result(1)


def _pools(entry: ir.Node) -> bool:
    if attribute(entry, "axis", 0) != 1:
        return False
    if is_op(entry, "Gather"):
        position = array(entry.inputs[1])
        return position is not None and position.ndim == 0
    return _end_positions(entry.inputs[1]) is not None


def _end_positions(value: ir.Value | None) -> ir.Value | None:
    """The ArgMax [batch] behind the index [batch, 1, width] of a text tower's pooling."""
    for op in ("Expand", "Unsqueeze"):
        made = maker(value)
        if made is None or not is_op(made, op):
            return None
        value = made.inputs[0]
    return value if is_op(maker(value), "ArgMax") else None


def products_of_pooled_row(model: ir.Model) -> frozenset[str]:
    """Names of the products that the rewrite leaves the pooled row only; the model is not changed."""
    twin = model.clone()  # shares the weights
    COMPUTE_POOLED_ROW.apply(twin)
    left = {entry.name for entry in twin.graph}
    return frozenset(entry.name or "" for entry in nodes_of(model.graph, "MatMul") if entry.name not in left)


class _PooledRow:
    """New nodes are built first, so that a graph that cannot be rewritten stays untouched."""

    def __init__(self, graph: ir.Graph, pool: ir.Node, attention: Attention) -> None:
        self._graph, self._pool, self._attention = graph, pool, attention
        self._whole = ancestors([attention.key, attention.value])  # what is needed of every row
        self._new: list[ir.Node] = []
        self._constants: dict[str, tuple[ir.Value, np.ndarray]] = {}
        self._done: dict[ir.Value, ir.Value] = {}

    def run(self) -> None:
        """Select the row, and let it take the pooling's place."""
        pooled = self._pool.inputs[0]
        assert pooled is not None
        row = self._select(pooled)
        if is_op(self._pool, "Gather"):
            axes = self._constant("pooled_row_axis", np.array([1], np.int64))
            last = self._add("Squeeze", [row, axes], "pooled_row_squeezed", name="pooled_row_squeeze")
        else:
            last = self._add("Identity", [row], "pooled_row_same", name="pooled_row_identity")
        for name, (value, values) in self._constants.items():
            value.replace_all_uses_with(set_constant(self._graph, name, values))
        insert_before(self._graph, self._pool, self._new)
        take_over(self._pool.outputs[0], last)

    def _select(self, value: ir.Value) -> ir.Value:
        """The pooled row of a value: [batch, 1, width]."""
        if value not in self._done:
            self._done[value] = self._make(value)
        return self._done[value]

    def _make(self, value: ir.Value) -> ir.Value:
        made = maker(value)
        if made is not None and _picks_channels(made):
            assert made.inputs[0] is not None
            return self._clone(made, {0: self._select(made.inputs[0])})
        if value in self._whole:
            if made is not None and is_op(made, "DequantizeLinear"):  # select integers: the pair must stay a pair
                return self._clone(made, {0: self._cut(made.inputs[0])})
            return self._cut(value)
        if made is None:
            raise _NotRowWise(f"{name_of(value)} is an input of the graph")
        if value is self._attention.output:
            return self._attend()
        if is_op(made, "MatMul"):
            data = made.inputs[0]
            if not _is_weight(made.inputs[1]) or data is None:
                raise _NotRowWise(f"{made.name} multiplies two activations")
            return self._clone(made, {0: self._select(data)})
        layer_norm = is_op(made, "LayerNormalization") and attribute(made, "axis", -1) in (-1, 2)
        if not layer_norm and not is_op(made, *_ROW_WISE):
            raise _NotRowWise(f"{made.name} ({made.op_type}) may look at other rows")
        inputs: dict[int, ir.Value] = {}
        for position, entry in enumerate(made.inputs):
            if entry is not None and not _is_weight(entry):
                inputs[position] = self._select(entry)
            elif entry is not None and _has_rows(entry):
                raise _NotRowWise(f"{name_of(entry)} differs from row to row")
        return self._clone(made, inputs)

    def _attend(self) -> ir.Value:
        """Scores, softmax and mixture of the one query."""
        found = self._attention
        depth = found.width // found.heads
        split = self._constant("pooled_row_split", np.array([-1, 1, found.heads, depth], np.int64))
        join = self._constant("pooled_row_join", np.array([-1, 1, found.width], np.int64))
        query = self._clone(found.split[0], {0: self._select(found.query), 1: split})
        query = self._clone(found.split[1], {0: query})
        scores = self._clone(found.scores, {0: query})
        added = maker(found.softmax.inputs[0])
        if found.mask is not None and added is not None:
            position = list(added.inputs).index(found.mask)
            scores = self._clone(added, {1 - position: scores, position: self._mask_row(found.mask)})
        mixed = self._clone(found.mixed, {0: self._clone(found.softmax, {0: scores})})
        return self._clone(found.join[1], {0: self._clone(found.join[0], {0: mixed}), 1: join})

    def _cut(self, value: ir.Value | None) -> ir.Value:
        """The pooling, moved here."""
        assert value is not None
        if value not in self._done:
            name = f"{name_of(value)}_pooled"
            index = self._position() if is_op(self._pool, "Gather") else self._pool.inputs[1]
            self._done[value] = self._add(self._pool.op_type, [value, index], name, name=f"{name}_gather", axis=1)
        return self._done[value]

    def _mask_row(self, mask: ir.Value) -> ir.Value:
        """[length, length] -> [batch or 1, 1, 1, length]; one for each text and head keeps its axes."""
        end = None if is_op(self._pool, "Gather") else _end_positions(self._pool.inputs[1])
        row, result = f"{name_of(mask)}_row", f"{name_of(mask)}_pooled"
        known = mask_axes(mask)
        if known == 4 and end is None:
            return self._add("Gather", [mask, self._position()], result, name=f"{result}_gather", axis=2)
        if known != 2:
            raise _NotRowWise(f"the axes of the mask {name_of(mask)} are not known")
        axes = self._constant("pooled_row_mask_axes", np.array([1, 2], np.int64))
        picked = self._add("Gather", [mask, end or self._position()], row, name=f"{row}_gather", axis=0)
        return self._add("Unsqueeze", [picked, axes], result, name=f"{result}_axes")

    def _position(self) -> ir.Value:
        return self._constant("pooled_row", constant(self._pool.inputs[1]).reshape(1).astype(np.int64))

    def _constant(self, name: str, values: np.ndarray) -> ir.Value:
        """A constant that enters the graph with the new nodes."""
        if name not in self._constants:
            self._constants[name] = ir.Value(name=f"{name}_later"), values
        return self._constants[name][0]

    def _add(
        self, op: str, inputs: list[ir.Value | None], output: str, *, name: str, axis: int | None = None
    ) -> ir.Value:
        self._new.append(node(op, inputs, output, name=name, attributes={"axis": axis}))
        return self._new[-1].outputs[0]

    def _clone(self, entry: ir.Node, inputs: dict[int, ir.Value]) -> ir.Value:
        """The same operator for the one row."""
        own = [inputs.get(position, value) for position, value in enumerate(entry.inputs)]
        output = ir.Value(name=f"{name_of(entry.outputs[0])}_pooled")
        twin = ir.Node(
            entry.domain,
            entry.op_type,
            own,
            list(entry.attributes.values()),
            outputs=[output],
            name=f"{entry.name}_pooled",
        )
        self._new.append(twin)
        return output


def _is_weight(value: ir.Value | None) -> bool:
    """An initialiser, or a weight on its way out of one."""
    while not is_constant(value):
        made = maker(value)
        if made is None or not is_op(made, "DequantizeLinear", "Cast"):
            return False
        value = made.inputs[0]
    return True


def _picks_channels(entry: ir.Node) -> bool:
    """The same channels of every row: the outliers that a product leaves to another."""
    return is_op(entry, "Gather") and attribute(entry, "axis", 0) in (-1, 2) and is_constant(entry.inputs[1])


def _has_rows(value: ir.Value) -> bool:
    """Whether a constant differs from row to row (a positional embedding)."""
    shape = dims(value)
    return shape is not None and len(shape) > 1 and shape[-2] != 1


COMPUTE_POOLED_ROW = Rewrite("last block for the pooled row only", "a transformer that pools one token", _compute)
