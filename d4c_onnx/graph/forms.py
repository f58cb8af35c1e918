"""The forms in which integers of a quantised weight lie in a file; each stores, recognises and unpacks itself.

- `int8`: an int8 initialiser.
- `cast`: an INT4 initialiser and a Cast to int8, which onnxruntime folds when the file is loaded. Needs opset 21 and
  onnxruntime 1.23.
- `nibbles`: two values a uint8, looked up in a table of 256 pairs of int8 (Gather). Any opset, onnxruntime 1.15.
  Unpacked by bit operations instead, the weights would be uint8 with zero point 8, and onnxruntime 1.32 multiplies
  those at half the speed of int8 ones.
- `native`: an INT4 initialiser straight into DequantizeLinear, as compilers want it; onnxruntime has no CPU kernel for
  int4 weights with int8 activations, so there such a layer is multiplied in float, three times slower than FP32.

- `trellis`: nibbles of which each reads two bits of the two before it, and multipliers of groups (`graph.trellis`).
  A byte, the bits before and the multiplier together are a row of one table of pairs, [16384, 2]. Needs opset 18 and
  onnxruntime 1.15. onnxruntime keeps what every node makes until the last one is folded, in memory that nothing used
  before: loading takes as long as these tensors are large, so only the numbers of rows are wider than a byte.

A form only ever moves integers: storing what another form unpacks to changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from itertools import count
from math import prod
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.packing import pack_int4, unpack_int4, unpack_uint4
from d4c_onnx.graph.trellis import LEVELS, PATH_BITS, Coded, level_numbers, row_numbers, shifted
from d4c_onnx.graph.values import (
    array,
    attribute,
    constant,
    dims,
    is_constant,
    is_op,
    maker,
    name_of,
    node,
    prepend,
    set_constant,
    walk_back,
)

_TABLE = "nibble_pairs"


class Form(Protocol):
    """One way for the integers of a weight to lie in a file.

    Attributes:
        name: for recipes and reports.
        num_bits: what one value takes, multipliers of groups not counted.
        opset: the least that can express it.
        minimum_onnxruntime: the oldest release tried that loads it.
    """

    name: str
    num_bits: int
    opset: int
    minimum_onnxruntime: str

    def find(self, integers: ir.Value) -> ir.Value | None:
        """The initialiser, when the value that is dequantised lies in this form."""
        ...

    def unpack(self, integers: ir.Value) -> np.ndarray:
        """The integers, int8 of the weight's own shape."""
        ...

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        """Of the weight."""
        ...

    def multipliers(self, integers: ir.Value) -> int:
        """How many nibbles multipliers of groups take, without looking at values."""
        ...

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        """Put int8 integers into a graph under a name; the value that is to be dequantised."""
        ...


class _Plain:
    """What forms without groups answer."""

    def multipliers(self, integers: ir.Value) -> int:
        return 0


@dataclass(slots=True, eq=False)
class _Initializer(_Plain):
    """The integers as they are, in an initialiser of the form's own type."""

    name: str
    num_bits: int
    opset: int
    dtype: ir.DataType
    minimum_onnxruntime: str = "1.20"

    def find(self, integers: ir.Value) -> ir.Value | None:
        return integers if is_constant(integers) and integers.dtype == self.dtype else None

    def unpack(self, integers: ir.Value) -> np.ndarray:
        values = constant(integers)
        return values.astype(np.int8) if self.dtype == ir.DataType.INT4 else values

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return dims(integers) or ()

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        return set_constant(graph, name, values.astype(self.dtype.numpy()))


class _Cast(_Plain):
    """INT4 -> Cast."""

    name, num_bits, opset, minimum_onnxruntime = "cast", 4, 21, "1.23"

    def find(self, integers: ir.Value) -> ir.Value | None:
        return _cast_from(integers, ir.DataType.INT4)

    def unpack(self, integers: ir.Value) -> np.ndarray:
        return constant(self.find(integers)).astype(np.int8)

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return dims(self.find(integers)) or ()

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        stored = set_constant(graph, f"{name}_int4", values.astype(ml_dtypes.int4))
        cast = node("Cast", [stored], name, name=f"{name}_cast", attributes={"to": ir.DataType.INT8})
        prepend(graph, [cast])
        return cast.outputs[0]


class _Nibbles(_Plain):
    """Cast(uint8 -> int32) -> Gather from the table of pairs -> Reshape; a last odd value is sliced off."""

    name, num_bits, opset, minimum_onnxruntime = "nibbles", 4, 13, "1.15"

    def find(self, integers: ir.Value) -> ir.Value | None:
        return _looked_up(integers, _pairs())

    def unpack(self, integers: ir.Value) -> np.ndarray:
        return unpack_int4(constant(self.find(integers)).tobytes(), _reshaped(integers))

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return _reshaped(integers)

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        stored = set_constant(graph, f"{name}_nibbles", np.frombuffer(pack_int4(values), np.uint8))
        nodes = _look_up(graph, stored, set_constant(graph, _TABLE, _pairs()), values.shape, name)
        prepend(graph, nodes)
        return nodes[-1].outputs[0]


class _Trellis:
    """Bytes [groups, inputs of a group / 2, channels], each of two neighbouring inputs of a channel.

    Concat of the bytes, of their bits of the path (BitwiseAnd), of the last such row of the group before (Slice -> Pad)
    and of the multipliers, looked up as nibbles are -> MatMulInteger, which makes them row numbers -> Gather from the
    table of levels -> Transpose -> Reshape.
    """

    name, num_bits, opset, minimum_onnxruntime = "trellis", 4, 18, "1.15"

    def find(self, integers: ir.Value) -> ir.Value | None:
        parts = self._parts(integers)
        return None if parts is None else parts[0]

    def unpack(self, integers: ir.Value) -> np.ndarray:
        return self.coded(integers).levels

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return _reshaped(integers)

    def coded(self, integers: ir.Value) -> Coded:
        """Nibbles and multipliers of a value that lies in this form."""
        parts = self._parts(integers)
        assert parts is not None
        stored, places, axis = parts
        multipliers = unpack_uint4(constant(_looked_up(places, _places())).tobytes(), _reshaped(places))
        return Coded.of_bytes(constant(stored), multipliers, axis)

    def multipliers(self, integers: ir.Value) -> int:
        parts = self._parts(integers)
        return 0 if parts is None else prod(_reshaped(parts[1]))

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        raise GraphError(f"{name}: integers are no path through a trellis. Round the weight anew.")

    def store_coded(self, graph: ir.Graph, name: str, values: Coded) -> ir.Value:
        """`store` of a path.

        Eleven nodes a weight: their names are short, because small models notice.
        """
        packed, multipliers = values.bytes, values.multiplier_rows
        rows, prefix, nodes = packed.shape[1], _unused_prefix(graph), list[ir.Node]()

        def add(op: str, given: list[ir.Value], letter: str, **attributes: object) -> ir.Value:
            nodes.append(node(op, given, f"{prefix}{letter}", attributes=attributes))
            return nodes[-1].outputs[0]

        def told(word: str, numbers: np.ndarray) -> ir.Value:
            return set_constant(graph, f"~{word}", numbers)

        stored = set_constant(graph, f"{prefix}p", packed)
        small = set_constant(graph, f"{prefix}m", np.frombuffer(pack_int4(multipliers), np.uint8))
        nodes += _look_up(graph, small, told("m", _places()), multipliers.shape, f"{prefix}s")
        places = nodes[-1].outputs[0]
        path = add("BitwiseAnd", [stored, told("b", _PATH)], "a")
        cut = [told(letter, numbers) for letter, numbers in _LAST_ROWS.items()]
        last = add("Pad", [add("Slice", [path, *cut], "b"), told("z", _ONE_GROUP)], "c")
        columns = add("Concat", [stored, path, last, places], "d", axis=1)
        numbers = add("MatMulInteger", [told(f"c{rows}", row_numbers(rows)), columns], "e")
        table = _level_table(graph)
        pairs = add("Gather", [table, numbers], "f", axis=0)
        turned = add("Transpose", [pairs], "g", perm=_PERMS[values.axis])
        nodes.append(node("Reshape", [turned, _shape(graph, values.shape)], name))
        prepend(graph, nodes)
        _to_the_front(graph, table)
        return nodes[-1].outputs[0]

    def _parts(self, integers: ir.Value) -> tuple[ir.Value, ir.Value, int] | None:
        """Bytes, the shifted multipliers, and the axis of the channels."""
        turned = maker(_input_of(integers, "Reshape"))
        if turned is None or not is_op(turned, "Transpose") or attribute(turned, "perm") not in _PERMS:
            return None
        gather = maker(turned.inputs[0])
        if gather is None or not _takes_rows(gather) or not _is_level_table(gather.inputs[0]):
            return None
        product = maker(gather.inputs[1])
        if product is None or not is_op(product, "MatMulInteger") or len(product.inputs) != 2:  # no zero points
            return None
        coefficients, joined = product.inputs[0], maker(product.inputs[1])
        if joined is None or not is_op(joined, "Concat") or attribute(joined, "axis") != 1 or len(joined.inputs) != 4:
            return None
        stored, path, last, places = joined.inputs
        if stored is None or places is None or not _is_path_of(stored, path, last):
            return None
        shape, whole = dims(stored) or (), _reshaped(integers)
        axis = _PERMS.index(attribute(turned, "perm"))
        if len(shape) != 3 or 0 in shape or len(whole) != 2 or dims(coefficients) != (shape[1], 2 * shape[1] + 2):
            return None
        groups, rows, channels = shape
        fits = whole[axis] == channels and whole[1 - axis] == 2 * groups * rows
        known = _same(coefficients, row_numbers(rows)) and _are_multipliers(places, (groups, 1, channels))
        return (stored, places, axis) if fits and known else None


# from [groups, rows, channels, 2], by the axis of the channels in the matrix
_PERMS = ([2, 0, 1, 3], [0, 1, 3, 2])
_PATH = np.array([PATH_BITS], np.uint8)
# of every group but the last one; one more before them
_LAST_ROWS = {"s": np.array([0, -1]), "e": np.array([-1, np.iinfo(np.int32).max]), "x": np.array([0, 1])}
_ONE_GROUP = np.array([1, 0, 0, 0, 0, 0])


def _is_path_of(stored: ir.Value, path: ir.Value | None, last: ir.Value | None) -> bool:
    """Whether one value is the path's bits of bytes in the file, and another their last row, one group later."""
    masked, padded = maker(path), maker(last)
    cut = maker(padded.inputs[0]) if padded is not None and is_op(padded, "Pad") else None
    if masked is None or not is_op(masked, "BitwiseAnd") or padded is None or cut is None or not is_op(cut, "Slice"):
        return False
    known = is_constant(stored) and stored.dtype == ir.DataType.UINT8
    known = known and masked.inputs[0] is stored and _same(masked.inputs[1], _PATH)
    known = known and cut.inputs[0] is path and len(cut.inputs) == 1 + len(_LAST_ROWS)
    known = known and all(map(_same, cut.inputs[1:], _LAST_ROWS.values()))
    zeros = len(padded.inputs) == 2 and attribute(padded, "mode", "constant") == "constant"
    return known and zeros and _same(padded.inputs[1], _ONE_GROUP)


def _are_multipliers(places: ir.Value, shape: tuple[int, ...]) -> bool:
    """Whether a value of that shape is looked up from as many nibbles."""
    nibbles = _looked_up(places, _places())
    return _reshaped(places) == shape and nibbles is not None and dims(nibbles) == (-(-prod(shape) // 2),)


def _cast_from(value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    """The constant of that type which a Cast to int8 makes a value from."""
    made = maker(value)
    if made is None or not is_op(made, "Cast") or attribute(made, "to") != ir.DataType.INT8:
        return None
    stored = made.inputs[0]
    return stored if is_constant(stored) and stored is not None and stored.dtype == dtype else None


def _inputs_of(value: ir.Value | None, op: str) -> tuple[ir.Value | None, ir.Value | None]:
    """The first two inputs of the operator that makes a value; None where another one does."""
    made = maker(value)
    return (made.inputs[0], made.inputs[1]) if made is not None and is_op(made, op) else (None, None)


def _input_of(value: ir.Value | None, op: str) -> ir.Value | None:
    """The first input of the operator that makes a value; None where another one does."""
    made = maker(value)
    return made.inputs[0] if made is not None and is_op(made, op) else None


def _takes_rows(made: ir.Node) -> bool:
    return is_op(made, "Gather") and attribute(made, "axis", 0) == 0


def _reshaped(value: ir.Value) -> tuple[int, ...]:
    """The shape that a Reshape gives a value; none where nothing does."""
    made = maker(value)
    shape = array(made.inputs[1]) if made is not None and is_op(made, "Reshape") else None
    return () if shape is None else tuple(int(size) for size in shape)


def _same(value: ir.Value | None, table: np.ndarray) -> bool:
    known = array(value)
    return known is not None and known.dtype == table.dtype and np.array_equal(known, table)


def _looked_up(value: ir.Value, table: np.ndarray) -> ir.Value | None:
    """The bytes whose rows of a table a value is made of."""
    made = maker(walk_back(value, "Reshape", "Slice"))
    if made is None or made is maker(value) or not _takes_rows(made):
        return None
    stored = walk_back(made.inputs[1], "Cast")
    return stored if is_constant(stored) and _same(made.inputs[0], table) else None


def _look_up(graph: ir.Graph, stored: ir.Value, table: ir.Value, shape: tuple[int, ...], name: str) -> list[ir.Node]:
    """The nodes that look bytes up in a table of pairs; the last one's output has the name and the shape."""
    packed, size = name_of(stored), prod(shape)
    rows = node("Cast", [stored], f"{packed}_r", attributes={"to": ir.DataType.INT32})
    pairs = node("Gather", [table, rows.outputs[0]], f"{packed}_t", attributes={"axis": 0})
    nodes = [rows, pairs]
    if size % 2:
        line, start = (
            set_constant(graph, constant_name, np.array([value], np.int64))
            for constant_name, value in (("nibble_line", -1), ("nibble_start", 0))
        )
        end = set_constant(graph, f"{packed}_e", np.array([size], np.int64))
        nodes.append(node("Reshape", [pairs.outputs[0], line], f"{packed}_l"))
        nodes.append(node("Slice", [nodes[-1].outputs[0], start, end], f"{packed}_f"))
    target = _shape(graph, shape)
    nodes.append(node("Reshape", [nodes[-1].outputs[0], target], name, name=f"{name}_unpack"))
    return nodes


def _shape(graph: ir.Graph, shape: tuple[int, ...]) -> ir.Value:
    """A constant that all reshapes to that shape share."""
    name = "~" + ".".join("" if size < 0 else str(size) for size in shape)
    return set_constant(graph, name, np.array(shape, np.int64))


INT8 = _Initializer("int8", 8, 13, ir.DataType.INT8)
# as other tools store weights, with zero points in the middle; ours never do
UINT8 = _Initializer("uint8", 8, 13, ir.DataType.UINT8)
NATIVE = _Initializer("native", 4, 21, ir.DataType.INT4)
CAST, NIBBLES, TRELLIS = _Cast(), _Nibbles(), _Trellis()
FORMS: dict[str, Form] = {form.name: form for form in (INT8, UINT8, CAST, NIBBLES, TRELLIS, NATIVE)}


def _pairs() -> np.ndarray:
    """The two int8 values of every byte, [256, 2]."""
    return unpack_int4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2))


def _level_table(graph: ir.Graph) -> ir.Value:
    """The two levels of every row, int8 [16 * 1024, 2], made when the file is loaded: 32 KB are much to a small model.

    Gather of levels, by their numbers (Cast), for each multiplier -> Reshape.
    """
    for entry in graph:
        if _is_level_table(entry.outputs[0]):
            return entry.outputs[0]
    levels, numbers = set_constant(graph, "~l", LEVELS), set_constant(graph, "~n", level_numbers())
    nodes = [node("Cast", [numbers], "~t0", attributes={"to": ir.DataType.INT32})]
    nodes.append(node("Gather", [levels, nodes[0].outputs[0]], "~t1", attributes={"axis": 1}))
    nodes.append(node("Reshape", [nodes[-1].outputs[0], _shape(graph, (-1, 2))], "~t"))
    prepend(graph, nodes)
    return nodes[-1].outputs[0]


def _is_level_table(value: ir.Value | None) -> bool:
    gather = maker(_input_of(value, "Reshape"))
    if value is None or gather is None or not is_op(gather, "Gather") or attribute(gather, "axis", 0) != 1:
        return False
    known = _same(gather.inputs[0], LEVELS) and _same(_input_of(gather.inputs[1], "Cast"), level_numbers())
    return known and _reshaped(value) == (-1, 2)


def _to_the_front(graph: ir.Graph, value: ir.Value) -> None:
    """Let the nodes that make a value from constants come before all others."""
    chain: list[ir.Node] = []
    made = maker(value)
    while made is not None:
        chain.insert(0, made)
        made = maker(made.inputs[0]) or maker(made.inputs[-1])
    for entry in chain:
        graph.remove(entry)
    prepend(graph, chain)


def _unused_prefix(graph: ir.Graph) -> str:
    """`~` and a number, for the names of one weight's values."""
    return next(f"~{number}" for number in count() if f"~{number}p" not in graph.initializers)


def _places() -> np.ndarray:
    """Of every byte, its two multipliers as the product of row numbers wants them, uint8 [256, 2]."""
    return shifted(unpack_uint4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2)))
