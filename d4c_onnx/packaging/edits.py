"""What changes at the boundary of an encoder's file, as values: each says in words what it does, and does it.

Edits never look inside: they move names, types and integers in storage. Whether the answers stay is checked by `proof`.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.forms import CAST, NATIVE, NIBBLES
from d4c_onnx.graph.opsets import lower_opset
from d4c_onnx.graph.stored import convert_stored, find_stored
from d4c_onnx.graph.values import name_of, node, nodes_of, prepend, set_constant, values_by_name


class Edit(Protocol):
    """One change of a file.

    Attributes:
        words: what it does, for the package's manifest.
    """

    @property
    def words(self) -> str: ...

    def apply(self, model: ir.Model) -> None:
        """Change the model in place."""
        ...


@dataclass(frozen=True, slots=True)
class RenameInput:
    """The first input gets another name."""

    name: str

    @property
    def words(self) -> str:
        return f"input named {self.name}"

    def apply(self, model: ir.Model) -> None:
        _rename(model, model.graph.inputs[0], self.name)


@dataclass(frozen=True, slots=True)
class RenameOutput:
    """The first output gets another name."""

    name: str

    @property
    def words(self) -> str:
        return f"output named {self.name}"

    def apply(self, model: ir.Model) -> None:
        _rename(model, model.graph.outputs[0], self.name)


@dataclass(frozen=True, slots=True)
class NarrowIds:
    """Token ids come as int32; a Cast makes them int64 inside."""

    words: str = "ids in int32"

    def apply(self, model: ir.Model) -> None:
        given = model.graph.inputs[0]
        to = {"to": ir.DataType.INT64}
        wide = _before(model, given, lambda ids: [node("Cast", [ids], "wide_ids", attributes=to)])
        wide.dtype = ir.DataType.INT64
        given.dtype = ir.DataType.INT32


@dataclass(frozen=True, slots=True)
class UnusedMask:
    """A second input that nothing reads, for stacks that feed a mask whether a model wants one or not.

    onnxruntime keeps declared inputs that no node reads.
    """

    name: str = "attention_mask"

    @property
    def words(self) -> str:
        return f"an unused input {self.name}"

    def apply(self, model: ir.Model) -> None:
        ids = next(value for value in model.graph.inputs if value.dtype in (ir.DataType.INT64, ir.DataType.INT32))
        model.graph.inputs.append(ir.Value(name=self.name, type=ids.type, shape=ids.shape))


@dataclass(frozen=True, slots=True)
class AsSequence:
    """[batch, D] becomes [batch, 1, D]: a sequence of one, whose first token is the embedding."""

    words: str = "the embedding as a sequence of one"

    def apply(self, model: ir.Model) -> None:
        old = model.graph.outputs[0]
        axis = set_constant(model.graph, "sequence_axis", np.array([1], np.int64))
        made = node("Unsqueeze", [old, axis], "as_sequence")
        model.graph.append(made)
        new, name, shape = made.outputs[0], name_of(old), list(old.shape or ())
        new.type, new.shape = old.type, ir.Shape([shape[0], 1, *shape[1:]])
        model.graph.outputs[0] = new
        old.name, new.name = f"{name}_pooled", name


@dataclass(frozen=True, slots=True)
class LooseLayout:
    """4-bit weights without the type INT4, which old runtimes do not know, and the opset as low as it goes.

    The type INT4 needs opset 21, its Cast onnxruntime 1.23 and a kernel that the WebGPU builds of onnxruntime lack.
    """

    words: str = "4-bit weights as nibbles, lowest opset"

    def apply(self, model: ir.Model) -> None:
        # what unpacks a weight is put in front of everything: the last one first, so that they come in graph order
        for entry in reversed(list(nodes_of(model.graph, "DequantizeLinear", "Mul"))):
            stored = find_stored(entry.outputs[0])
            if stored is not None and stored.dequantize is entry and stored.form in (CAST, NATIVE):
                convert_stored(model.graph, stored, NIBBLES)
        lower_opset(model)


@dataclass(frozen=True, slots=True)
class GuardIds:
    """Texts as a tower can read them, whatever a server's tokenizer did.

    What lies behind the context is cut off, and where a row is full and holds no end token, its last id becomes one: so
    does open_clip's own tokenizer. Rows that are right already stay as they are.

        cut    = ids[:, :context]
        ends   = any(cut == end) or len < context
        out    = cut, but for the last column: where(ends, cut, end)

    A tower of a fixed length gets shorter rows filled up with its padding.

    Attributes:
        context: the longest row that the tower takes.
        end_id: the end token; None: texts are only cut.
        fill_id: what fills rows up to the context; None: the tower takes any length.
    """

    context: int
    end_id: int | None
    fill_id: int | None = None

    @property
    def words(self) -> str:
        filled = "" if self.fill_id is None else f", filled up with {self.fill_id}"
        ended = "" if self.end_id is None else f", ended with {self.end_id} when full"
        return f"ids cut to {self.context}{ended}{filled}"

    def apply(self, model: ir.Model) -> None:
        given = model.graph.inputs[0]
        shape = list(given.shape or ())
        guarded = _before(model, given, lambda ids: self._nodes(model.graph, ids))
        guarded.type = given.type
        if self.fill_id is not None:
            given.shape = ir.Shape([shape[0], "sequence"])

    def _nodes(self, graph: ir.Graph, ids: ir.Value) -> list[ir.Node]:
        def of(name: str, *values: int) -> ir.Value:
            return set_constant(graph, f"guard_{name}", np.array(values, np.int64))

        axis, start = of("axis", 1), of("start", 0)
        nodes = [node("Slice", [ids, start, of("context", self.context), axis], "guard_cut")]
        if self.end_id is not None:
            nodes += self._ended(graph, nodes[-1].outputs[0], of, axis, start)
        if self.fill_id is not None:
            nodes += self._filled(graph, nodes[-1].outputs[0], of, axis)
        return nodes

    def _ended(self, graph: ir.Graph, cut: ir.Value, of: _Constants, axis: ir.Value, start: ir.Value) -> list[ir.Node]:
        """The last id becomes the end token where the row is full and has none."""
        end, last = of("end", self.end_id or 0), of("last", -1)
        to = {"to": ir.DataType.INT64}
        equal = node("Equal", [cut, end], "guard_equal")
        ones = node("Cast", [equal.outputs[0]], "guard_ones", attributes=to)
        ends = node("ReduceSum", [ones.outputs[0], axis], "guard_ends", attributes={"keepdims": 1})
        size = node("Shape", [cut], "guard_shape", attributes={"start": 1, "end": 2})
        short = node("Less", [size.outputs[0], of("length", self.context)], "guard_short")
        room = node("Cast", [short.outputs[0]], "guard_room", attributes=to)
        right = node("Add", [ends.outputs[0], room.outputs[0]], "guard_right")
        keep = node("Cast", [right.outputs[0]], "guard_keep", attributes={"to": ir.DataType.BOOL})
        rest = node("Slice", [cut, start, last, axis], "guard_rest")
        tail = node("Slice", [cut, last, of("behind", 2**31 - 1), axis], "guard_tail")
        ended = node("Where", [keep.outputs[0], tail.outputs[0], end], "guard_ended")
        whole = node("Concat", [rest.outputs[0], ended.outputs[0]], "guard_whole", attributes={"axis": 1})
        return [equal, ones, ends, size, short, room, right, keep, rest, tail, ended, whole]

    def _filled(self, graph: ir.Graph, ids: ir.Value, of: _Constants, axis: ir.Value) -> list[ir.Node]:
        """Rows up to the context: a whole context of padding behind them, cut once more."""
        size = node("Shape", [ids], "guard_rows", attributes={"start": 0, "end": 1})
        shape = node("Concat", [size.outputs[0], of("length", self.context)], "guard_fills", attributes={"axis": 0})
        fill = node("Expand", [of("fill", self.fill_id or 0), shape.outputs[0]], "guard_padding")
        longer = node("Concat", [ids, fill.outputs[0]], "guard_longer", attributes={"axis": 1})
        cut = [longer.outputs[0], of("start", 0), of("context", self.context), axis]
        return [size, shape, fill, longer, node("Slice", cut, "guard_filled")]


class _Constants(Protocol):
    def __call__(self, name: str, *values: int) -> ir.Value: ...


class _Makes(Protocol):
    def __call__(self, ids: ir.Value) -> list[ir.Node]: ...


def _before(model: ir.Model, given: ir.Value, makes: _Makes) -> ir.Value:
    """Let all that reads an input read what nodes make of it; the last one's output."""
    kept = ir.Value(name="")  # stands for the input while its readers get the new value
    nodes = makes(kept)
    last = nodes[-1].outputs[0]
    given.replace_all_uses_with(last)
    kept.replace_all_uses_with(given)
    prepend(model.graph, nodes)
    return last


def _rename(model: ir.Model, value: ir.Value, name: str) -> None:
    if value.name == name:
        return
    other = values_by_name(model.graph).get(name)
    if other is not None and other.is_initializer():
        model.graph.initializers.pop(name)
        other.name = f"{name}_inside"
        model.graph.register_initializer(other)
    elif other is not None:
        other.name = f"{name}_inside"
    value.name = name
