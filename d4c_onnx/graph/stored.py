"""How a quantised weight lies in a file: its forms, each of which stores, recognises and unpacks itself.

A product multiplies with a *real* value; behind it stand scales (a DequantizeLinear, or a Mul of constants) and the
*integers*, which lie in one of these forms:

- `int8`: an int8 initialiser.
- `cast`: an INT4 initialiser and a Cast to int8, which onnxruntime folds when the file is loaded. Needs opset 21 and
  onnxruntime 1.23.
- `nibbles`: two values a uint8, looked up in a table of 256 pairs of int8 (Gather). Any opset, onnxruntime 1.20.
  Unpacked by bit operations instead, the weights would be uint8 with zero point 8, and onnxruntime 1.32 multiplies
  those at half the speed of int8 ones.
- `native`: an INT4 initialiser straight into DequantizeLinear, as compilers want it; onnxruntime has no CPU kernel for
  int4 weights with int8 activations, so there such a layer is multiplied in float, three times slower than FP32.

A form only ever moves integers: storing what another form unpacks to changes no number.
"""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from math import prod
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.layers import WEIGHTED_OPS
from d4c_onnx.graph.values import (
    CONTRIB,
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
    readers,
    replace_input,
    set_constant,
    walk_back,
)

# onnxruntime's own product of integers with a float result; quantised files may hold it
INTEGER_PRODUCT = f"{CONTRIB}:MatMulIntegerToFloat"
STORED_OPS = (*WEIGHTED_OPS, INTEGER_PRODUCT)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)
_TABLE = "nibble_pairs"


class Form(Protocol):
    """One way for the integers of a weight to lie in a file.

    Attributes:
        name: for recipes and reports.
        num_bits: what one value takes.
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

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        """Put int8 integers into a graph under a name; the value that is to be dequantised."""
        ...


@dataclass(slots=True, eq=False)
class _Initializer:
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

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        return set_constant(graph, name, values.astype(self.dtype.numpy()))


class _Cast:
    name, num_bits, opset, minimum_onnxruntime = "cast", 4, 21, "1.23"

    def find(self, integers: ir.Value) -> ir.Value | None:
        made = maker(integers)
        if made is None or not is_op(made, "Cast") or attribute(made, "to") != ir.DataType.INT8:
            return None
        stored = made.inputs[0]
        return stored if is_constant(stored) and stored is not None and stored.dtype == ir.DataType.INT4 else None

    def unpack(self, integers: ir.Value) -> np.ndarray:
        return constant(self.find(integers)).astype(np.int8)

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        stored = set_constant(graph, f"{name}_int4", values.astype(ml_dtypes.int4))
        cast = node("Cast", [stored], name, name=f"{name}_cast", attributes={"to": ir.DataType.INT8})
        prepend(graph, [cast])
        return cast.outputs[0]


class _Nibbles:
    """Cast(uint8 -> int32) -> Gather from the table of pairs -> Reshape; a last odd value is sliced off."""

    name, num_bits, opset, minimum_onnxruntime = "nibbles", 4, 13, "1.20"

    def find(self, integers: ir.Value) -> ir.Value | None:
        made = maker(walk_back(integers, "Reshape", "Slice"))
        if made is None or made is maker(integers) or not is_op(made, "Gather"):
            return None
        table, stored = array(made.inputs[0]), walk_back(made.inputs[1], "Cast")
        known = table is not None and table.dtype == np.int8 and np.array_equal(table, _pairs())
        return stored if known and is_constant(stored) else None

    def unpack(self, integers: ir.Value) -> np.ndarray:
        made = maker(integers)
        shape = constant(made.inputs[1] if made is not None else None)
        return unpack_int4(constant(self.find(integers)).tobytes(), tuple(int(size) for size in shape))

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        packed = f"{name}_nibbles"
        stored = set_constant(graph, packed, np.frombuffer(pack_int4(values), np.uint8))
        rows = node("Cast", [stored], f"{packed}_rows", attributes={"to": ir.DataType.INT32})
        table = set_constant(graph, _TABLE, _pairs())
        pairs = node("Gather", [table, rows.outputs[0]], f"{packed}_pairs", attributes={"axis": 0})
        nodes = [rows, pairs]
        if values.size % 2:
            line, start = (
                set_constant(graph, constant_name, np.array([value], np.int64))
                for constant_name, value in (("nibble_line", -1), ("nibble_start", 0))
            )
            end = set_constant(graph, f"{packed}_end", np.array([values.size], np.int64))
            nodes.append(node("Reshape", [pairs.outputs[0], line], f"{packed}_line"))
            nodes.append(node("Slice", [nodes[-1].outputs[0], start, end], f"{packed}_flat"))
        shape = set_constant(graph, f"{name}_shape", np.array(values.shape, np.int64))
        nodes.append(node("Reshape", [nodes[-1].outputs[0], shape], name, name=f"{name}_unpack"))
        prepend(graph, nodes)
        return nodes[-1].outputs[0]


INT8 = _Initializer("int8", 8, 13, ir.DataType.INT8)
# as other tools store weights, with zero points in the middle; ours never do
UINT8 = _Initializer("uint8", 8, 13, ir.DataType.UINT8)
NATIVE = _Initializer("native", 4, 21, ir.DataType.INT4)
CAST, NIBBLES = _Cast(), _Nibbles()
FORMS: dict[str, Form] = {form.name: form for form in (INT8, UINT8, CAST, NIBBLES, NATIVE)}


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as a product's input leads back to it.

    Attributes:
        initializer: what is in the file.
        shape: of the weight.
        num_bits: that one value takes in the file.
        form: of its integers; None where it is stored in float.
        integers: the value that is given its scale; None in float.
        scale: an initialiser, one value or one a channel; None in float.
        dequantize: the DequantizeLinear, the Mul or the integer product that applies the scale; None in float.
    """

    initializer: ir.Value
    shape: tuple[int, ...]
    num_bits: int
    form: Form | None = None
    integers: ir.Value | None = None
    scale: ir.Value | None = None
    dequantize: ir.Node | None = None

    def unpack(self) -> np.ndarray:
        """The integers of the weight's shape, int8 but for the form uint8; a float weight's own values."""
        if self.form is None or self.integers is None:
            return constant(self.initializer)
        return self.form.unpack(self.integers)


def stored_weight(product: ir.Node) -> StoredWeight | None:
    """The stored weight of a MatMul, Gemm, Conv or integer product; None where it multiplies two activations."""
    if not is_op(product, *STORED_OPS):
        return None
    if is_op(product, INTEGER_PRODUCT):
        return _integers_of(product.inputs[1], product.inputs[3], product)
    for value in (product.inputs[1], product.inputs[0]) if product.op_type == "MatMul" else (product.inputs[1],):
        found = find_stored(value)
        if found is not None and len(found.shape) >= 2:
            return found
    return None


def find_stored(value: ir.Value | None) -> StoredWeight | None:
    """The stored weight behind a real value: float, dequantised, or unpacked by a Mul of constants."""
    value = walk_back(value, "Transpose", "Reshape", "Identity")
    if is_constant(value) and value is not None and value.dtype in _FLOATS:
        return StoredWeight(value, dims(value) or (), 16 if value.dtype != ir.DataType.FLOAT else 32)
    value = walk_back(value, "Cast", "Slice")  # a weight that is unpacked to float16 is cast to it last
    if value is not None and is_constant(value) and value.dtype in _FLOATS:
        return StoredWeight(value, dims(value) or (), 16 if value.dtype != ir.DataType.FLOAT else 32)
    made = maker(value)
    if made is None:
        return None
    if is_op(made, "DequantizeLinear"):
        return _integers_of(made.inputs[0], made.inputs[1], made)
    if is_op(made, "Mul") and is_constant(made.inputs[1]):
        cast = maker(made.inputs[0])
        if cast is not None and is_op(cast, "Cast"):
            return _integers_of(cast.inputs[0], made.inputs[1], made)
    return None


def _integers_of(value: ir.Value | None, scale: ir.Value | None, dequantize: ir.Node) -> StoredWeight | None:
    value = value if is_constant(value) else walk_back(value, "Transpose", "QuantizeLinear", "Identity")
    if value is None:
        return None
    for form in FORMS.values():
        stored = form.find(value)
        if stored is not None:
            made = maker(value)
            packed = array(made.inputs[1]) if form is NIBBLES and made is not None else None
            shape = dims(stored) or () if packed is None else tuple(int(size) for size in packed)
            return StoredWeight(stored, shape, form.num_bits, form, value, scale, dequantize)
    if is_constant(value) and value.dtype in _FLOATS:  # quantised when the file is loaded
        return StoredWeight(value, dims(value) or (), 32)
    return None


def convert_stored(graph: ir.Graph, stored: StoredWeight, form: Form) -> None:
    """Let the integers of a stored weight lie in another form, in place; every reader, and every number, stays.

    Zero points of a DequantizeLinear take the integers' type.

    Raises:
        GraphError: the form cannot hold the values, or they are unsigned.
    """
    value = stored.integers
    if value is None or stored.form is form:
        return
    integers, name = stored.unpack(), name_of(value)
    narrow = form.num_bits == 4 and bool(integers.size) and (integers.min() < -8 or integers.max() > 7)
    if narrow or UINT8 in (stored.form, form):
        raise GraphError(
            f"{name}: its values, {integers.dtype} up to {integers.max()}, do not fit the form {form.name}."
        )
    uses = readers(value)
    if is_constant(value):
        graph.initializers.pop(name)
    value.name = f"{name}_before"
    fresh = form.store(graph, name, integers)
    for reader in uses:
        replace_input(reader, value, fresh)
        zero = reader.inputs[2] if is_op(reader, "DequantizeLinear") and len(reader.inputs) > 2 else None
        known, kind = array(zero), np.dtype(ml_dtypes.int4 if form is NATIVE else np.int8)
        if zero is not None and known is not None and known.dtype != kind:  # its own: another may share the old one
            reader.replace_input_with(2, set_constant(graph, f"{name}_zero_{kind.name}", known.astype(kind)))
            _drop_unread(graph, zero)
    _drop_unread(graph, value)  # converted once more, it would be there twice under one name


def _drop_unread(graph: ir.Graph, value: ir.Value) -> None:
    """Remove what makes a value that nothing reads any more, back to the initialisers that only it needed."""
    queue = [value]
    while queue:
        entry = queue.pop()
        made = entry.producer()
        if entry.is_graph_output() or next(iter(entry.uses()), None) is not None:
            continue
        if made is not None:
            queue += [part for part in made.inputs if part is not None]
            graph.remove(made, safe=True)
        elif graph.initializers.get(name_of(entry)) is entry:
            graph.initializers.pop(name_of(entry))


@dataclass(frozen=True, slots=True)
class LayerBits:
    """One weighted layer of a file: node, op, stored initialiser, the weight's shape, bits per stored weight."""

    node: str
    op: str
    weight: str
    shape: tuple[int, ...]
    bits: int

    @property
    def elements(self) -> int:
        """How many weights."""
        return prod(self.shape)


def layer_bits(model: ir.Model) -> list[LayerBits]:
    """Every MatMul (onnxruntime's integer one, too), Gemm and Conv with a stored weight, and how wide it is stored."""
    found = ((entry, stored_weight(entry)) for entry in model.graph)
    return [
        LayerBits(entry.name or "", entry.op_type, name_of(stored.initializer), stored.shape, stored.num_bits)
        for entry, stored in found
        if stored is not None
    ]


def average_bits(layers: Iterable[LayerBits]) -> float:
    """Stored bits per weight, over all weights of all given layers."""
    counted = list(layers)
    total = sum(layer.elements for layer in counted)
    return sum(layer.elements * layer.bits for layer in counted) / total if total else 0.0


def pack_int4(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the low nibble, row-major: ONNX's INT4 layout.

    Args:
        values: integers in [-8, 7], any shape.
    """
    flat = np.asarray(values, np.int8).ravel()
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    nibbles = flat.view(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


def unpack_int4(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack_int4`: int8 of the given shape."""
    packed = np.frombuffer(raw, np.uint8)
    nibbles = np.stack([packed & 0x0F, packed >> 4], 1).ravel()[: int(np.prod(shape, dtype=np.int64))]
    return ((nibbles ^ 8).astype(np.int8) - 8).reshape(shape)


def _pairs() -> np.ndarray:
    """The two int8 values of every byte, [256, 2]."""
    return unpack_int4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2))
