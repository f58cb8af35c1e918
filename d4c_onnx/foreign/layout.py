"""Where elements go: chains of Reshape, Transpose, Slice and so on, followed with the number of each element.

Exporters split and join heads in many ways. What a chain does is told by running it on numbers of elements, not by how
it is written.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.foreign.probe import Probe, known_value, sizes_only
from d4c_onnx.graph.layers import is_plain
from d4c_onnx.graph.values import array, attribute, is_op, maker, name_of, only_reader, set_constant

_MOVES = ("Reshape", "Transpose", "Squeeze", "Unsqueeze", "Flatten", "Slice", "Gather", "Split", "Identity")


@dataclass(frozen=True, slots=True)
class Chain:
    """One linear layer with what moves its elements before and behind.

    Attributes:
        source: what the first move reads.
        before: nodes between the source and the layer.
        linear: MatMul or Gemm with a constant matrix.
        bias: added to it, or None.
        behind: nodes behind it, each with the value that goes on.
        factors: scalars that the result is multiplied by (True) or divided by (False) on the way.
    """

    source: ir.Value
    before: tuple[tuple[ir.Node, ir.Value], ...]
    linear: ir.Node
    bias: ir.Value | None
    behind: tuple[tuple[ir.Node, ir.Value], ...]
    factors: tuple[tuple[ir.Value, bool], ...]

    def helpers(self) -> list[ir.Value]:
        """Values that say how elements are moved, or scaled."""
        nodes = [entry for entry, _ in (*self.before, *self.behind)]
        found = [value for entry in nodes for value in entry.inputs[1:] if value is not None]
        return [*found, *(value for value, _ in self.factors)]

    def matrix(self) -> np.ndarray:
        """float32 [in, out]."""
        weight = array(self.linear.inputs[1])
        assert weight is not None
        scale = float(attribute(self.linear, "alpha", 1.0))
        turned = weight.T if attribute(self.linear, "transB", 0) else weight
        return turned if scale == 1.0 else turned * np.float32(scale)

    def vector(self) -> np.ndarray:
        """The bias, float32 [out]."""
        found = array(self.bias)
        return np.zeros(self.matrix().shape[1], np.float32) if found is None else found


def chain_to(value: ir.Value | None) -> Chain | None:
    """The linear layer that makes a value, back through moves and scalar factors; None where something else does."""
    behind: list[tuple[ir.Node, ir.Value]] = []
    factors: list[tuple[ir.Value, bool]] = []
    bias: ir.Value | None = None
    made = maker(value)
    while made is not None and value is not None and not is_plain(made):
        following = made.inputs[0]
        if _moves(made) and bias is None:
            behind.insert(0, (made, value))
        elif is_op(made, "Mul", "Div") and (place := _scalar(made)) is not None and bias is None:
            factor = made.inputs[place]
            assert factor is not None
            factors.append((factor, is_op(made, "Mul")))
            following = made.inputs[1 - place]
        elif is_op(made, "Add") and bias is None and (place := _added(made)) is not None:
            bias, following = made.inputs[place], made.inputs[1 - place]
        else:
            return None
        value, made = following, maker(following)
    if made is None:
        return None
    return _with_source(made, bias, tuple(behind), tuple(factors))


def chain_from(value: ir.Value) -> Chain | None:
    """The linear layer that alone reads a value, forth through moves, and what moves its result; None otherwise."""
    before: list[tuple[ir.Node, ir.Value]] = []
    source, reader = value, only_reader(value)
    while reader is not None and _moves(reader) and reader.inputs[0] is value:
        value = reader.outputs[0]
        before.append((reader, value))
        reader = only_reader(value)
    if reader is None or not is_plain(reader) or reader.inputs[0] is not value:
        return None
    bias = reader.inputs[2] if is_op(reader, "Gemm") and len(reader.inputs) > 2 else None
    linear, value = reader, reader.outputs[0]
    behind: list[tuple[ir.Node, ir.Value]] = []
    reader = only_reader(value)
    while reader is not None:
        place = _added(reader) if is_op(reader, "Add") and bias is None and not behind else None
        if place is not None:
            bias = reader.inputs[place]
        elif not _moves(reader) or reader.inputs[0] is not value:
            break
        value = reader.outputs[0]
        behind.append((reader, value))
        reader = only_reader(value)
    return Chain(source, tuple(before), linear, bias, tuple(behind), ())


def _with_source(
    linear: ir.Node,
    bias: ir.Value | None,
    behind: tuple[tuple[ir.Node, ir.Value], ...],
    factors: tuple[tuple[ir.Value, bool], ...],
) -> Chain | None:
    if is_op(linear, "Gemm") and len(linear.inputs) > 2 and linear.inputs[2] is not None:
        if bias is not None:
            return None
        bias = linear.inputs[2]
    before: list[tuple[ir.Node, ir.Value]] = []
    source = linear.inputs[0]
    made = maker(source)
    while source is not None and made is not None and _moves(made):
        before.insert(0, (made, source))
        source = made.inputs[0]
        made = maker(source)
    return None if source is None else Chain(source, tuple(before), linear, bias, behind, factors)


def _moves(entry: ir.Node) -> bool:
    """Whether a node moves elements of its first input, to places that depend on sizes alone."""
    return is_op(entry, *_MOVES) and array(entry.inputs[0]) is None and all(map(sizes_only, entry.inputs[1:]))


def _scalar(entry: ir.Node) -> int | None:
    """Which input of a product is its scalar: a constant, or what is computed of sizes."""
    for place in (1, 0):
        found = array(entry.inputs[place])
        if found is not None and found.size == 1:
            return place
    computed = maker(entry.inputs[1])
    return 1 if computed is not None and is_op(computed, "Sqrt", "Div", "Cast", "Pow", "Reciprocal") else None


def _added(entry: ir.Node) -> int | None:
    for place in (1, 0):
        found = array(entry.inputs[place])
        if found is not None and found.ndim == 1:
            return place
    return None


def fold_moved_weights(model: ir.Model, probe: Probe) -> None:
    """Weights that a graph cuts out of a packed one, or turns, become constants of their own, in place.

    Args:
        probe: of this very model: where to cut may be computed of sizes.
    """
    moves = [entry for entry in model.graph if is_op(entry, *_MOVES)]
    helpers = [value for entry in moves for value in entry.inputs[1:] if array(value) is None and sizes_only(value)]
    first, *others = probe.look((value for value in helpers if value is not None), ())
    known = {name: found for name, found in first.items() if all(np.array_equal(found, o[name]) for o in others)}
    for entry in moves:
        whole = array(entry.inputs[0])
        if whole is None or any(value is not None and known_value(value, known) is None for value in entry.inputs[1:]):
            continue
        for value in entry.outputs:
            found = moved(whole, ((entry, value),), known)
            if found is not None and found.size <= whole.size:
                value.replace_all_uses_with(set_constant(model.graph, f"{name_of(value)}_folded", found))


def moved(
    numbers: np.ndarray, nodes: tuple[tuple[ir.Node, ir.Value], ...], seen: dict[str, np.ndarray]
) -> np.ndarray | None:
    """An array after nodes that move its elements; None where one of them cannot be followed."""
    found: np.ndarray | None = numbers
    for entry, value in nodes:
        if found is None:
            return None
        try:
            found = _move(entry, value, found, seen)
        except (ValueError, IndexError):  # sizes that do not fit: what was moved is not what the nodes expect
            return None
    return found


def _move(entry: ir.Node, value: ir.Value, given: np.ndarray, seen: dict[str, np.ndarray]) -> np.ndarray | None:
    helpers = [known_value(helper, seen) for helper in entry.inputs[1:]]
    if any(helper is None and entry.inputs[place] is not None for place, helper in enumerate(helpers, 1)):
        return None
    if is_op(entry, "Add", "Identity"):  # a bias moves nothing
        return given
    if is_op(entry, "Reshape"):
        copied = not attribute(entry, "allowzero", 0)
        sizes = [given.shape[axis] if copied and size == 0 else int(size) for axis, size in enumerate(helpers[0])]
        return given.reshape(sizes)
    if is_op(entry, "Transpose"):
        return given.transpose(attribute(entry, "perm"))
    if is_op(entry, "Squeeze"):
        return given.squeeze(tuple(int(axis) for axis in helpers[0])) if helpers else given.squeeze()
    if is_op(entry, "Unsqueeze"):
        return np.expand_dims(given, tuple(int(axis) for axis in helpers[0]))
    if is_op(entry, "Flatten"):
        axis = int(attribute(entry, "axis", 1))
        return given.reshape(int(np.prod(given.shape[:axis])), -1)
    if is_op(entry, "Gather"):
        return np.take(given, helpers[0], int(attribute(entry, "axis", 0)))
    if is_op(entry, "Slice"):
        return _sliced(given, helpers)
    if is_op(entry, "Split"):
        axis, place = int(attribute(entry, "axis", 0)), list(entry.outputs).index(value)
        ends = np.cumsum(helpers[0])[:-1] if helpers else len(entry.outputs)
        return np.array_split(given, ends, axis)[place] if helpers else np.split(given, ends, axis)[place]
    return None


def _sliced(given: np.ndarray, helpers: list[np.ndarray]) -> np.ndarray:
    starts, ends = helpers[:2]
    axes = helpers[2] if len(helpers) > 2 else np.arange(len(starts))
    steps = helpers[3] if len(helpers) > 3 else np.ones(len(starts), np.int64)
    for start, end, axis, step in zip(starts, ends, axes, steps, strict=True):
        chosen = [slice(None)] * given.ndim
        chosen[int(axis)] = slice(int(start), int(end), int(step))
        given = given[tuple(chosen)]
    return given
