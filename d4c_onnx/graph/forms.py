"""The forms in which integers of a quantised weight lie in a file; each stores, recognises and unpacks itself.

- `int8`: an int8 initialiser.
- `cast`: an INT4 initialiser and a Cast to int8, which onnxruntime folds when the file is loaded. Needs opset 21 and
  onnxruntime 1.23.
- `nibbles`: two values a uint8, looked up in a table of 256 pairs of int8 (Gather). Any opset, onnxruntime 1.15.
  Unpacked by bit operations instead, the weights would be uint8 with zero point 8, and onnxruntime 1.32 multiplies
  those at half the speed of int8 ones.
- `native`: an INT4 initialiser straight into DequantizeLinear, as compilers want it; onnxruntime has no CPU kernel for
  int4 weights with int8 activations, so there such a layer is multiplied in float, three times slower than FP32.

Where groups of a channel's inputs share a multiplier, integers are products q * m on the channel's int8 grid, of 4-bit
q and m. `cast` and `nibbles` store both instead of the products, which are made when the file is loaded: `cast` by a
Mul of int8, `nibbles` by a table of the products of a byte's two values with every multiplier, for onnxruntime 1.20
has no such Mul. One of int32 or float, whose tensors are four times as large, takes several times as long.

A form only ever moves integers: storing what another form unpacks to changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from math import prod
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.packing import Grouped, pack_int4, unpack_int4, unpack_uint4
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

_TABLE, _STARTS, _PRODUCTS = "nibble_pairs", "nibble_starts", "nibble_products"


class Form(Protocol):
    """One way for the integers of a weight to lie in a file.

    Attributes:
        name: for recipes and reports.
        num_bits: what one value takes, multipliers of groups not counted.
        grouped: whether it can hold multipliers of groups.
        opset: the least that can express it.
        minimum_onnxruntime: the oldest release tried that loads it.
    """

    name: str
    num_bits: int
    grouped: bool
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

    def groups(self, integers: ir.Value) -> Grouped | None:
        """The parts of products; None where integers lie by themselves."""
        ...

    def multipliers(self, integers: ir.Value) -> int:
        """How many nibbles multipliers take, without looking at values."""
        ...

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        """Put int8 integers into a graph under a name; the value that is to be dequantised."""
        ...

    def store_groups(self, graph: ir.Graph, name: str, values: Grouped) -> ir.Value:
        """`store` of products, for forms that are `grouped`."""
        ...


class _Plain:
    """What forms without groups answer."""

    grouped = False

    def groups(self, integers: ir.Value) -> Grouped | None:
        return None

    def multipliers(self, integers: ir.Value) -> int:
        return 0

    def store_groups(self, graph: ir.Graph, name: str, values: Grouped) -> ir.Value:
        raise GraphError(f"{name}: no form of this kind holds multipliers of groups.")


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


class _Cast:
    """INT4 -> Cast; in groups INT4 blocks -> Cast -> Mul by UINT4 multipliers -> Cast -> Reshape to the matrix."""

    name, num_bits, grouped, opset, minimum_onnxruntime = "cast", 4, True, 21, "1.23"

    def find(self, integers: ir.Value) -> ir.Value | None:
        parts = self._parts(integers)
        return parts[0] if parts is not None else _cast_from(integers, ir.DataType.INT4)

    def unpack(self, integers: ir.Value) -> np.ndarray:
        groups = self.groups(integers)
        return constant(self.find(integers)).astype(np.int8) if groups is None else groups.products

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return dims(self.find(integers)) or () if self._parts(integers) is None else _reshaped(integers)

    def groups(self, integers: ir.Value) -> Grouped | None:
        parts = self._parts(integers)
        if parts is None:
            return None
        blocks, multipliers = (constant(part) for part in parts)
        return Grouped.of_blocks(blocks.astype(np.int8), multipliers.astype(np.uint8), _axis(blocks, multipliers))

    def multipliers(self, integers: ir.Value) -> int:
        parts = self._parts(integers)
        return 0 if parts is None else prod(dims(parts[1]) or ())

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        stored = set_constant(graph, f"{name}_int4", values.astype(ml_dtypes.int4))
        cast = node("Cast", [stored], name, name=f"{name}_cast", attributes={"to": ir.DataType.INT8})
        prepend(graph, [cast])
        return cast.outputs[0]

    def store_groups(self, graph: ir.Graph, name: str, values: Grouped) -> ir.Value:
        int4, uint4 = f"{name}_int4", f"{name}_multipliers"
        to = {"to": ir.DataType.INT8}
        blocks = set_constant(graph, int4, values.blocks.astype(ml_dtypes.int4))
        multipliers = set_constant(graph, uint4, values.multiplier_blocks.astype(ml_dtypes.uint4))
        nodes = [node("Cast", [blocks], f"{int4}_cast", attributes=to)]
        nodes.append(node("Cast", [multipliers], f"{uint4}_cast", attributes=to))
        nodes.append(node("Mul", [entry.outputs[0] for entry in nodes], f"{name}_products"))
        shape = set_constant(graph, f"{name}_shape", np.array(values.integers.shape, np.int64))
        nodes.append(node("Reshape", [nodes[-1].outputs[0], shape], name, name=f"{name}_unpack"))
        prepend(graph, nodes)
        return nodes[-1].outputs[0]

    def _parts(self, integers: ir.Value) -> tuple[ir.Value, ir.Value] | None:
        """Blocks and multipliers; None without groups."""
        made = maker(integers)
        product = maker(made.inputs[0]) if made is not None and is_op(made, "Reshape") else None
        if product is None or not is_op(product, "Mul"):
            return None
        blocks = _cast_from(product.inputs[0], ir.DataType.INT4)
        multipliers = _cast_from(product.inputs[1], ir.DataType.UINT4)
        if blocks is None or multipliers is None or not _are_groups(dims(blocks), dims(multipliers)):
            return None
        return blocks, multipliers


class _Nibbles:
    """Cast(uint8 -> int32) -> Gather from the table of pairs -> Reshape; a last odd value is sliced off.

    In groups: bytes of two inputs of a channel each -> Cast -> Add -> Gather from the table of products, [4096, 2] ->
    Transpose, where channels come last -> Reshape. What is added is where the multiplier's rows start: 256 times
    itself, looked up in a table like all nibbles.
    """

    name, num_bits, grouped, opset, minimum_onnxruntime = "nibbles", 4, True, 13, "1.15"

    def find(self, integers: ir.Value) -> ir.Value | None:
        parts = self._parts(integers)
        return parts[0] if parts is not None else _looked_up(integers, _pairs())

    def unpack(self, integers: ir.Value) -> np.ndarray:
        groups = self.groups(integers)
        if groups is not None:
            return groups.products
        return unpack_int4(constant(self.find(integers)).tobytes(), _reshaped(integers))

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return _reshaped(integers)

    def groups(self, integers: ir.Value) -> Grouped | None:
        parts = self._parts(integers)
        if parts is None:
            return None
        packed, starts, last = constant(parts[0]), parts[1], parts[2]
        blocks = unpack_int4(packed.tobytes(), (*packed.shape, 2))
        if last:  # [groups, size / 2, channels, 2]
            blocks = blocks.swapaxes(2, 3).reshape(len(packed), -1, packed.shape[2])
        multipliers = unpack_uint4(constant(_looked_up(starts, _starts())).tobytes(), _reshaped(starts))
        return Grouped.of_blocks(blocks.reshape(*blocks.shape[:2], -1), multipliers, 1 if last else 0)

    def multipliers(self, integers: ir.Value) -> int:
        parts = self._parts(integers)
        return 0 if parts is None else prod(_reshaped(parts[1]))

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        packed = f"{name}_nibbles"
        stored = set_constant(graph, packed, np.frombuffer(pack_int4(values), np.uint8))
        table = set_constant(graph, _TABLE, _pairs())
        nodes = _look_up(graph, stored, table, values.shape, name)
        prepend(graph, nodes)
        return nodes[-1].outputs[0]

    def store_groups(self, graph: ir.Graph, name: str, values: Grouped) -> ir.Value:
        packed, last = f"{name}_nibbles", values.axis == 1
        blocks, multipliers = values.blocks, values.multiplier_blocks
        pairs = blocks.reshape(len(blocks), -1, 2, blocks.shape[2]).swapaxes(2, 3) if last else blocks
        lines = np.frombuffer(pack_int4(pairs), np.uint8)
        stored = set_constant(graph, packed, lines.reshape((*pairs.shape[:3],) if last else (*blocks.shape[:2], -1)))
        small = set_constant(graph, f"{name}_multipliers_nibbles", np.frombuffer(pack_int4(multipliers), np.uint8))
        starts = set_constant(graph, _STARTS, _starts())
        nodes = _look_up(graph, small, starts, multipliers.shape, f"{name}_multipliers")
        rows = node("Cast", [stored], f"{packed}_bytes", attributes={"to": ir.DataType.INT32})
        places = node("Add", [rows.outputs[0], nodes[-1].outputs[0]], f"{packed}_rows")
        table = set_constant(graph, _PRODUCTS, _products())
        nodes += [rows, places, node("Gather", [table, places.outputs[0]], f"{packed}_pairs", attributes={"axis": 0})]
        if last:
            order = {"perm": [0, 1, 3, 2]}
            nodes.append(node("Transpose", [nodes[-1].outputs[0]], f"{packed}_inputs", attributes=order))
        shape = set_constant(graph, f"{name}_shape", np.array(values.integers.shape, np.int64))
        nodes.append(node("Reshape", [nodes[-1].outputs[0], shape], name, name=f"{name}_unpack"))
        prepend(graph, nodes)
        return nodes[-1].outputs[0]

    def _parts(self, integers: ir.Value) -> tuple[ir.Value, ir.Value, bool] | None:
        """Bytes, what is added to them, and whether the channels are the last axis; None without groups."""
        made = maker(integers)
        turned = maker(made.inputs[0]) if made is not None and is_op(made, "Reshape") else None
        last = turned is not None and is_op(turned, "Transpose")
        if turned is not None and last and attribute(turned, "perm") != [0, 1, 3, 2]:
            return None
        gather = maker(turned.inputs[0]) if turned is not None and last else turned
        places = maker(gather.inputs[1]) if gather is not None and is_op(gather, "Gather") else None
        if gather is None or places is None or not is_op(places, "Add") or not _same(gather.inputs[0], _products()):
            return None
        stored, starts = walk_back(places.inputs[0], "Cast"), places.inputs[1]
        if stored is None or starts is None or _looked_up(starts, _starts()) is None:
            return None
        shape, small = dims(stored) or (), _reshaped(starts)
        fits = len(shape) == 3 and small == ((shape[0], 1, shape[2]) if last else (*shape[:2], 1))
        return (stored, starts, last) if fits and stored.dtype == ir.DataType.UINT8 else None


def _cast_from(value: ir.Value | None, dtype: ir.DataType) -> ir.Value | None:
    """The constant of that type which a Cast to int8 makes a value from."""
    made = maker(value)
    if made is None or not is_op(made, "Cast") or attribute(made, "to") != ir.DataType.INT8:
        return None
    stored = made.inputs[0]
    return stored if is_constant(stored) and stored is not None and stored.dtype == dtype else None


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
    if made is None or made is maker(value) or not is_op(made, "Gather"):
        return None
    stored = walk_back(made.inputs[1], "Cast")
    return stored if is_constant(stored) and _same(made.inputs[0], table) else None


def _look_up(graph: ir.Graph, stored: ir.Value, table: ir.Value, shape: tuple[int, ...], name: str) -> list[ir.Node]:
    """The nodes that look bytes up in a table of pairs; the last one's output has the name and the shape."""
    packed, size = name_of(stored), prod(shape)
    rows = node("Cast", [stored], f"{packed}_rows", attributes={"to": ir.DataType.INT32})
    pairs = node("Gather", [table, rows.outputs[0]], f"{packed}_pairs", attributes={"axis": 0})
    nodes = [rows, pairs]
    if size % 2:
        line, start = (
            set_constant(graph, constant_name, np.array([value], np.int64))
            for constant_name, value in (("nibble_line", -1), ("nibble_start", 0))
        )
        end = set_constant(graph, f"{packed}_end", np.array([size], np.int64))
        nodes.append(node("Reshape", [pairs.outputs[0], line], f"{packed}_line"))
        nodes.append(node("Slice", [nodes[-1].outputs[0], start, end], f"{packed}_flat"))
    target = set_constant(graph, f"{name}_shape", np.array(shape, np.int64))
    nodes.append(node("Reshape", [nodes[-1].outputs[0], target], name, name=f"{name}_unpack"))
    return nodes


def _are_groups(blocks: tuple[int, ...] | None, multipliers: tuple[int, ...] | None) -> bool:
    """Whether the shapes are those of `Grouped`."""
    if blocks is None or multipliers is None or len(blocks) != 3 or len(multipliers) != 3:
        return False
    return multipliers in ((*blocks[:2], 1), (blocks[0], 1, blocks[2])) and blocks != multipliers


def _axis(blocks: np.ndarray, multipliers: np.ndarray) -> int:
    """Where the channels are, of the matrix: the blocks' inputs are the axis that the multipliers lack."""
    return 0 if multipliers.shape == (*blocks.shape[:2], 1) else 1


INT8 = _Initializer("int8", 8, 13, ir.DataType.INT8)
# as other tools store weights, with zero points in the middle; ours never do
UINT8 = _Initializer("uint8", 8, 13, ir.DataType.UINT8)
NATIVE = _Initializer("native", 4, 21, ir.DataType.INT4)
CAST, NIBBLES = _Cast(), _Nibbles()
FORMS: dict[str, Form] = {form.name: form for form in (INT8, UINT8, CAST, NIBBLES, NATIVE)}


def _pairs() -> np.ndarray:
    """The two int8 values of every byte, [256, 2]."""
    return unpack_int4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2))


def _starts() -> np.ndarray:
    """Of every byte, the rows of `_products` where those of its two multipliers start, int32 [256, 2]."""
    return 256 * unpack_uint4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2)).astype(np.int32)


def _products() -> np.ndarray:
    """The two values of every byte times every multiplier of 4 bits, int8 [16 * 256, 2]."""
    return (np.arange(16, dtype=np.int8)[:, None, None] * _pairs()).reshape(-1, 2)
