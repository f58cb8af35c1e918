"""The forms in which integers of a quantised weight lie in a file; each stores, recognises and unpacks itself.

- `int8`: an int8 initialiser.
- `cast`: an INT4 initialiser and a Cast to int8, which onnxruntime folds when the file is loaded. Needs opset 21 and
  onnxruntime 1.23.
- `nibbles`: two values a uint8, looked up in a table of 256 pairs of int8 (Gather). Any opset, onnxruntime 1.15.
  Unpacked by bit operations instead, the weights would be uint8 with zero point 8, and onnxruntime 1.32 multiplies
  those at half the speed of int8 ones.
- `native`: an INT4 initialiser straight into DequantizeLinear, as compilers want it; onnxruntime has no CPU kernel for
  int4 weights with int8 activations, so there such a layer is multiplied in float, three times slower than FP32.
- `trellis`, `trellis3`, `trellis5`: codes of 4, 3 and 5 bits of which each reads two bits of the two before it, and
  multipliers of groups, in `trellis_form`. Need opset 18 and onnxruntime 1.15.

A form only ever moves integers: storing what another form unpacks to changes no number.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import ml_dtypes
import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.lookups import look_up, looked_up, reshaped
from d4c_onnx.graph.packing import pack_int4, unpack_int4
from d4c_onnx.graph.trellis_form import TRELLISES
from d4c_onnx.graph.values import (
    attribute,
    constant,
    dims,
    is_constant,
    is_op,
    maker,
    node,
    prepend,
    set_constant,
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
        made = maker(integers)
        if made is None or not is_op(made, "Cast") or attribute(made, "to") != ir.DataType.INT8:
            return None
        stored = made.inputs[0]
        return stored if stored is not None and is_constant(stored) and stored.dtype == ir.DataType.INT4 else None

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
        return looked_up(integers, _pairs())

    def unpack(self, integers: ir.Value) -> np.ndarray:
        return unpack_int4(constant(self.find(integers)).tobytes(), reshaped(integers))

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return reshaped(integers)

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        stored = set_constant(graph, f"{name}_nibbles", np.frombuffer(pack_int4(values), np.uint8))
        nodes = look_up(graph, stored, set_constant(graph, _TABLE, _pairs()), values.shape, name)
        prepend(graph, nodes)
        return nodes[-1].outputs[0]


INT8 = _Initializer("int8", 8, 13, ir.DataType.INT8)
# as other tools store weights, with zero points in the middle; ours never do
UINT8 = _Initializer("uint8", 8, 13, ir.DataType.UINT8)
NATIVE = _Initializer("native", 4, 21, ir.DataType.INT4)
CAST, NIBBLES = _Cast(), _Nibbles()
_ALL: tuple[Form, ...] = (INT8, UINT8, CAST, NIBBLES, *TRELLISES.values(), NATIVE)
FORMS = {form.name: form for form in _ALL}


def _pairs() -> np.ndarray:
    """The two int8 values of every byte, [256, 2]."""
    return unpack_int4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2))
