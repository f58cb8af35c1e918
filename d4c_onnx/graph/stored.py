"""How a quantised weight lies in a file: what stands between a product and the initialiser, and how wide that is.

A product multiplies with a *real* value; behind it stand scales (a DequantizeLinear, or a Mul of constants) and the
*integers*, which lie in one of the `forms`. Moving them from one into another changes no number.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable
from dataclasses import dataclass, replace
from math import prod

import ml_dtypes
import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.forms import FORMS, NATIVE, UINT8, Form
from d4c_onnx.graph.layers import WEIGHTED_OPS
from d4c_onnx.graph.lookups import reshaped
from d4c_onnx.graph.trellis import Coded
from d4c_onnx.graph.trellis_form import TRELLISES
from d4c_onnx.graph.values import (
    CONTRIB,
    array,
    constant,
    dims,
    is_constant,
    is_op,
    maker,
    name_of,
    only_reader,
    readers,
    replace_input,
    set_constant,
    walk_back,
)

# onnxruntime's own product of integers with a float result; quantised files may hold it
INTEGER_PRODUCT = f"{CONTRIB}:MatMulIntegerToFloat"
STORED_OPS = (*WEIGHTED_OPS, INTEGER_PRODUCT)
_FLOATS = (ir.DataType.FLOAT, ir.DataType.FLOAT16, ir.DataType.BFLOAT16)


@dataclass(frozen=True, slots=True)
class StoredWeight:
    """A weight as a product's input leads back to it.

    Attributes:
        initializer: what is in the file.
        shape: of the weight.
        num_bits: that one value takes in the file, with its share of a multiplier.
        form: of its integers; None where it is stored in float.
        integers: the value that is given its scale; None in float.
        scale: an initialiser, one value or one a channel; None in float.
        dequantize: the DequantizeLinear, the Mul or the integer product that applies the scale; None in float.
    """

    initializer: ir.Value
    shape: tuple[int, ...]
    num_bits: float
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
            return _in_blocks(_integers_of(cast.inputs[0], made.inputs[1], made))
    return None


def _in_blocks(found: StoredWeight | None) -> StoredWeight | None:
    """A weight whose values are scaled in blocks before a Reshape gives them its shape: scales count, too."""
    if found is None or found.dequantize is None:
        return found
    reader = only_reader(found.dequantize.outputs[0])
    shape = () if reader is None else reshaped(reader.outputs[0])
    scales = prod(dims(found.scale) or ()) if found.scale is not None else 0
    return replace(found, shape=shape, num_bits=found.num_bits + 32 * scales / prod(shape)) if shape else found


def _integers_of(value: ir.Value | None, scale: ir.Value | None, dequantize: ir.Node) -> StoredWeight | None:
    value = value if is_constant(value) else walk_back(value, "Transpose", "QuantizeLinear", "Identity")
    if value is None:
        return None
    for form in FORMS.values():
        stored = form.find(value)
        if stored is not None:
            shape, extra = form.shape(value), form.multipliers(value)
            bits = form.num_bits + 4 * extra / prod(shape) if extra else form.num_bits
            return StoredWeight(stored, shape, bits, form, value, scale, dequantize)
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
    if narrow or form in TRELLISES.values() or UINT8 in (stored.form, form):
        raise GraphError(
            f"{name}: its values, {integers.dtype} up to {integers.max()}, do not fit the form {form.name}."
        )
    _exchange(graph, value, form, lambda: form.store(graph, name, integers))


def store_coded(graph: ir.Graph, stored: StoredWeight, coded: Coded) -> None:
    """`convert_stored` into a trellis' form, in place, of integers that are its levels.

    Raises:
        GraphError: the graph holds other integers.
    """
    value = stored.integers
    assert value is not None
    name = name_of(value)
    if not np.array_equal(coded.levels, stored.unpack()):
        raise GraphError(f"{name}: the graph holds other integers than its path makes.")
    form = TRELLISES[coded.num_bits]
    _exchange(graph, value, form, lambda: form.store_coded(graph, name, coded))


def _exchange(graph: ir.Graph, value: ir.Value, form: Form, store: Callable[[], ir.Value]) -> None:
    """Let the readers of integers read what `store` puts into the graph under their name."""
    name = name_of(value)
    uses = readers(value)
    if is_constant(value):
        graph.initializers.pop(name)
    value.name = f"{name}_before"
    fresh = store()
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
            if made.graph is None:  # two of those that are gone read it
                continue
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
    bits: float

    @property
    def elements(self) -> int:
        """How many weights."""
        return prod(self.shape)


def layer_bits(model: ir.Model) -> list[LayerBits]:
    """Every MatMul (onnxruntime's integer one, too), Gemm and Conv with a stored weight, and how wide it is stored.

    A weight that several of them read is listed once, by the first.
    """
    found: dict[ir.Value, LayerBits] = {}
    for entry in model.graph:
        stored = stored_weight(entry)
        if stored is not None and stored.initializer not in found:
            found[stored.initializer] = LayerBits(
                entry.name or "", entry.op_type, name_of(stored.initializer), stored.shape, stored.num_bits
            )
    return list(found.values())


def average_bits(layers: Iterable[LayerBits]) -> float:
    """Stored bits per weight, over all weights of all given layers."""
    counted = list(layers)
    total = sum(layer.elements for layer in counted)
    return sum(layer.elements * layer.bits for layer in counted) / total if total else 0.0
