"""onnxruntime's own operators, as its optimisers write them into files, in ONNX's operators again.

Each is a short formula of its documentation, exact up to float32 rounding. What a formula does not cover (past keys,
rotary positions, packed tokens) is refused by name. What comes of it is compared with the file like everything else.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import ModelError
from d4c_onnx.graph.model import drop_unused, with_shapes
from d4c_onnx.graph.values import (
    CONTRIB,
    STANDARD,
    array,
    attribute,
    is_op,
    maker,
    name_of,
    node,
    readers,
    set_constant,
    set_scalar,
    take_over,
    walk_back,
)
from d4c_onnx.untrusted_json import quoted

_HIDDEN = -10000.0  # what hides a score, where the node does not say it
_QUICK = 1.702

Made = dict[int, ir.Value]  # by the number of the output


class _Unknown(Exception):
    """What a formula does not cover, in words."""


class _Writer:
    """Nodes in place of one node, and what is known of ranks."""

    def __init__(self, model: ir.Model, entry: ir.Node, ranks: Mapping[str, int]) -> None:
        self._model, self.entry, self._ranks = model, entry, ranks
        self._name = entry.name or entry.op_type
        self.nodes: list[ir.Node] = []

    def __call__(self, op: str, inputs: Sequence[ir.Value | None], what: str, **attributes: Any) -> ir.Value:
        made = node(op, inputs, f"{self._name}_{what}", attributes=attributes)
        self.nodes.append(made)
        return made.outputs[0]

    def const(self, what: str, values: Any, dtype: type[np.generic] = np.float32) -> ir.Value:
        name = f"{self._name}_{what}"
        if np.ndim(values) == 0:
            return set_scalar(self._model.graph, name, values, dtype)
        return set_constant(self._model.graph, name, np.array(values, dtype))

    def input(self, number: int) -> ir.Value | None:
        """An input; None where it is left out."""
        value = self.entry.inputs[number] if number < len(self.entry.inputs) else None
        return value if value is not None and value.name else None

    def need(self, number: int) -> ir.Value:
        value = self.input(number)
        if value is None:
            raise _Unknown(f"without its input {number}")
        return value

    def refuse(self, *numbers: int) -> None:
        """Raises: _Unknown: one of these inputs is there."""
        for number in numbers:
            if self.input(number) is not None:
                raise _Unknown(f"with an input {number}")

    def rank(self, value: ir.Value) -> int:
        """Raises: _Unknown: nothing says it."""
        found = array(value)
        rank = self._ranks.get(name_of(value)) if found is None else found.ndim
        if rank is None:
            raise _Unknown(f"on {quoted(value.name)}, whose number of axes nothing says")
        return rank

    def size(self, value: ir.Value, axis: int, what: str) -> ir.Value:
        """A size, int64 []."""
        return self(
            "Gather", [self("Shape", [value], f"{what}_sizes"), self.const(f"{what}_axis", axis, np.int64)], what
        )

    def added(self, values: list[ir.Value | None], what: str) -> ir.Value:
        """The sum of those that are there."""
        given = [value for value in values if value is not None]
        total = given[0]
        for number, value in enumerate(given[1:]):
            total = self("Add", [total, value], f"{what}_{number}")
        return total


def is_expanded(entry: ir.Node) -> bool:
    """Whether an operator of onnxruntime's own has a formula here."""
    return entry.domain == CONTRIB and entry.op_type in _RULES


def expand_contrib(model: ir.Model, path: Path) -> None:
    """Write every operator of onnxruntime's own in ONNX's operators of opset 20, in place.

    Args:
        path: of the file, for messages.

    Raises:
        ModelError: one is used in a way that its formula does not cover.
    """
    found = [entry for entry in model.graph.all_nodes() if is_expanded(entry)]
    ranks = _ranks(model) if found else {}
    for entry in found:
        write = _Writer(model, entry, ranks)
        try:
            made = _RULES[entry.op_type](write)
            missing = [n for n, value in enumerate(entry.outputs) if n not in made and _is_used(value, model)]
            if missing:
                raise _Unknown(f"with an output {missing[0]}")
        except _Unknown as error:
            raise ModelError(
                f"{path}: {quoted(entry.name)} is {entry.domain}:{entry.op_type} {error}. Export it again without "
                "optimisations for one runtime."
            ) from error
        if entry.graph is not None:
            entry.graph.insert_before(entry, write.nodes)
        for number, value in made.items():
            if number < len(entry.outputs):
                take_over(entry.outputs[number], value)
    drop_unused(model)
    kept = {entry.domain for entry in model.graph.all_nodes()} | set(STANDARD)
    for domain in [domain for domain in model.graph.opset_imports if domain not in kept]:
        del model.graph.opset_imports[domain]


def _ranks(model: ir.Model) -> dict[str, int]:
    """The number of axes of every value that ONNX can infer."""
    graph = with_shapes(model).graph
    typed = [entry for entry in (*graph.value_info, *graph.input) if entry.type.tensor_type.HasField("shape")]
    return {entry.name: len(entry.type.tensor_type.shape.dim) for entry in typed}


def _is_used(value: ir.Value, model: ir.Model) -> bool:
    return bool(value.name) and (bool(readers(value)) or value in model.graph.outputs)


def _gelu(write: _Writer) -> Made:
    """Gelu(x), exact."""
    return {0: write("Gelu", [write.need(0)], "gelu", approximate="none")}


def _bias_gelu(write: _Writer) -> Made:
    """Gelu(a + b), exact."""
    return {0: write("Gelu", [write.added([write.need(0), write.need(1)], "biased")], "gelu", approximate="none")}


def _fast_gelu(write: _Writer) -> Made:
    """Gelu(x + b) by tanh; b may be left out."""
    return {0: write("Gelu", [write.added([write.need(0), write.input(1)], "biased")], "gelu", approximate="tanh")}


def _quick_gelu(write: _Writer) -> Made:
    """x sigmoid(a x)."""
    alpha = write.const("alpha", attribute(write.entry, "alpha", _QUICK))
    gate = write("Sigmoid", [write("Mul", [write.need(0), alpha], "scaled")], "gate")
    return {0: write("Mul", [write.need(0), gate], "gelu")}


def _skip_layer_norm(write: _Writer) -> Made:
    """LayerNormalization(x + skip + bias); the sum is its fourth output."""
    total = write.added([write.need(0), write.need(1), write.input(4)], "sum")
    return {0: _normed(write, total, 2, 3), 3: total}


def _embed_layer_norm(write: _Writer) -> Made:
    """LayerNormalization of the embeddings of tokens, positions and, where there are any, segments."""
    ids, segments, positions = write.need(0), write.input(1), write.input(8)
    write.refuse(7)
    parts: list[ir.Value | None] = [write("Gather", [write.need(2), ids], "tokens")]
    if positions is None:  # the first rows of the table
        zero = write.const("zero", [0], np.int64)
        length = write("Unsqueeze", [write.size(ids, 1, "length"), zero], "end")
        parts.append(write("Slice", [write.need(3), zero, length, zero], "places"))
    else:
        parts.append(write("Gather", [write.need(3), positions], "places"))
    parts.append(None if segments is None else write("Gather", [write.need(4), segments], "kinds"))
    total = write.added(parts, "sum")
    return {0: _normed(write, total, 5, 6), 2: total}


def _normed(write: _Writer, value: ir.Value, gain: int, shift: int) -> ir.Value:
    epsilon = attribute(write.entry, "epsilon", 1e-12)
    inputs = [value, write.need(gain), write.input(shift)]
    return write("LayerNormalization", inputs, "normed", axis=-1, epsilon=epsilon)


def _fused_matmul(write: _Writer) -> Made:
    """alpha A B, either of them turned."""
    operands: list[ir.Value | None] = []
    for number, side in enumerate("AB"):
        if attribute(write.entry, f"transBatch{side}", 0):
            raise _Unknown(f"with transBatch{side}")
        value = write.need(number)
        if attribute(write.entry, f"trans{side}", 0):
            axes = list(range(write.rank(value)))
            if len(axes) > 1:
                value = write("Transpose", [value], f"turned_{side}", perm=[*axes[:-2], axes[-1], axes[-2]])
        operands.append(value)
    product, alpha = write("MatMul", operands, "product"), attribute(write.entry, "alpha", 1.0)
    return {0: product if alpha == 1 else write("Mul", [product, write.const("alpha", alpha)], "scaled")}


def _attention(write: _Writer) -> Made:
    """Attention of one input with packed, constant projections."""
    write.refuse(4, 6)
    if attribute(write.entry, "do_rotary", 0):
        raise _Unknown("with rotary positions")
    packed, bias = array(write.need(1)), write.input(2)
    vector = array(bias)
    if packed is None or packed.ndim != 2 or (bias is not None and vector is None):
        raise _Unknown("whose projections are no constants")
    sizes = attribute(write.entry, "qkv_hidden_sizes") or [packed.shape[1] // 3] * 3
    ends = np.cumsum(sizes)[:2]
    projected = []
    for number, (name, matrix) in enumerate(zip(("query", "key", "value"), np.split(packed, ends, 1), strict=True)):
        made = write("MatMul", [write.need(0), write.const(f"{name}_weight", matrix)], f"{name}_product")
        if vector is not None:
            made = write("Add", [made, write.const(f"{name}_bias", np.split(vector, ends)[number])], name)
        projected.append(made)
    return {0: _attend(write, projected, write.input(3), write.input(5))}


def _multi_head_attention(write: _Writer) -> Made:
    """Attention of three inputs, each [batch, length, width], which a packed bias is added to."""
    write.refuse(6, 7, 8, 9)
    bias = write.input(3)
    vector = array(bias)
    if bias is not None and (vector is None or len(vector) % 3):
        raise _Unknown("whose bias is no constant of three equal parts")
    projected = []
    for number, name in enumerate(("query", "key", "value")):
        value = write.need(number)
        if vector is not None:
            value = write("Add", [value, write.const(f"{name}_bias", np.split(vector, 3)[number])], name)
        projected.append(value)
    return {0: _attend(write, projected, write.input(4), write.input(5))}


def _attend(write: _Writer, projected: list[ir.Value], hidden: ir.Value | None, bias: ir.Value | None) -> ir.Value:
    """softmax(q k^T s + masks) v, heads split and joined."""
    heads = write.const("heads", [0, 0, attribute(write.entry, "num_heads"), -1], np.int64)
    orders = ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3])
    split = [
        write("Transpose", [write("Reshape", [value, heads], f"{name}_apart")], f"{name}_split", perm=perm)
        for name, value, perm in zip(("query", "key", "value"), projected, orders, strict=True)
    ]
    scores = write("Mul", [write("MatMul", split[:2], "scores"), _scale(write, split[0])], "scaled")
    masks = [_causal(write, projected), _padding(write, projected[1], hidden), bias]
    if any(mask is not None for mask in masks):
        scores = write("Add", [scores, write.added(masks, "mask")], "masked")
    mixed = write("MatMul", [write("Softmax", [scores], "weights", axis=-1), split[2]], "mixed")
    joined = write("Transpose", [mixed], "together", perm=[0, 2, 1, 3])
    return write("Reshape", [joined, write.const("width", [0, 0, -1], np.int64)], "joined")


def _scale(write: _Writer, query: ir.Value) -> ir.Value:
    """Of the scores: what the node says, else 1 / sqrt(depth)."""
    said = attribute(write.entry, "scale", 0.0)
    if said:
        return write.const("scale", said)
    depth = write("Cast", [write.size(query, 3, "depth")], "depth_float", to=int(ir.DataType.FLOAT))
    return write("Div", [write.const("one_float", 1), write("Sqrt", [depth], "root")], "scale")


def _causal(write: _Writer, projected: list[ir.Value]) -> ir.Value | None:
    if not attribute(write.entry, "unidirectional", 0):
        return None
    sizes = [write.size(value, 1, what) for value, what in zip(projected[:2], ("rows", "columns"), strict=True)]
    axis = write.const("front", [0], np.int64)
    shape = write(
        "Concat", [write("Unsqueeze", [size, axis], f"side_{n}") for n, size in enumerate(sizes)], "sides", axis=0
    )
    fill = ir.tensor(np.array([_filter(write)], np.float32))
    whole = write("ConstantOfShape", [shape], "all_hidden", value=fill)
    return write("Trilu", [whole, write.const("above", 1, np.int64)], "later", upper=1)


def _padding(write: _Writer, key: ir.Value, hidden: ir.Value | None) -> ir.Value | None:
    """What hides padding, [batch, 1, 1, keys], of the counts of tokens [batch] or a mask of them [batch, keys]."""
    if hidden is None:
        return None
    zero = write.const("nothing", 0, np.int64)
    rank = write.rank(hidden)
    whole = write("Cast", [hidden], "mask_long", to=int(ir.DataType.INT64))
    if rank == 1 and is_op(maker(walk_back(hidden, "Cast")), "ReduceSum"):
        places = write("Range", [zero, write.size(key, 1, "keys"), write.const("step", 1, np.int64)], "places")
        counts = write("Unsqueeze", [whole, write.const("behind", [1], np.int64)], "counts")
        beyond = write("GreaterOrEqual", [places, counts], "beyond")
    elif rank == 2:
        beyond = write("LessOrEqual", [whole, zero], "beyond")
    else:
        raise _Unknown(f"with a mask of {rank} axes")
    filled = write("Where", [beyond, write.const("filter", _filter(write)), write.const("open", 0)], "hidden")
    return write("Unsqueeze", [filled, write.const("inner", [1, 2], np.int64)], "padding")


def _filter(write: _Writer) -> float:
    return float(attribute(write.entry, "mask_filter_value", _HIDDEN))


_RULES: dict[str, Callable[[_Writer], Made]] = {
    "Attention": _attention,
    "BiasGelu": _bias_gelu,
    "EmbedLayerNormalization": _embed_layer_norm,
    "FastGelu": _fast_gelu,
    "FusedMatMul": _fused_matmul,
    "Gelu": _gelu,
    "MultiHeadAttention": _multi_head_attention,
    "QuickGelu": _quick_gelu,
    "SkipLayerNormalization": _skip_layer_norm,
}
