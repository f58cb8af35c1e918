"""The token table: integers with one scale a row, in the form that the target can read.

- `PACKED`: integers that stay packed in memory; only looked-up rows are unpacked. A DequantizeLinear of the whole table
  would run over all 49,408 rows for every query, and a Cast of it would be folded at load, at the cost of loading time
  and twice the memory.
- `FOLDED`: integers that are unpacked when the file is loaded, for the CUDA provider has no bit operations.
- `FLOAT`: as it is, for TensorRT's parser takes neither.
"""

from enum import Enum

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.model import drop_unused
from d4c_onnx.graph.values import (
    constant,
    dims,
    insert_before,
    is_constant,
    name_of,
    node,
    nodes_of,
    set_constant,
    take_over,
)
from d4c_onnx.quantization.rounding.base import QuantizedWeight, WeightGrid
from d4c_onnx.quantization.rounding.nearest import NearestRounding
from d4c_onnx.quantization.storage.weights import store_scaled


class TokenTable(Enum):
    """How a target wants it."""

    PACKED = "packed"
    FOLDED = "folded"
    FLOAT = "float"


def store_token_table(model: ir.Model, num_bits: int, form: TokenTable) -> int | None:
    """Round the token table to nearest and store it, in place.

    Args:
        num_bits: 4 or 8; a packed table of odd width gets 8.

    Returns:
        Its bits; None where there is no table, or it stays as it is.
    """
    gather = None if form is TokenTable.FLOAT else find_token_table(model.graph)
    if gather is None or gather.inputs[0] is None:
        return None
    table = gather.inputs[0]
    if table.dtype == ir.DataType.FLOAT16:  # what unpacks looked-up rows gives float32
        form = TokenTable.FOLDED
    rows = constant(table).astype(np.float32, copy=False)
    bits = num_bits if form is TokenTable.FOLDED or rows.shape[1] % 2 == 0 else 8
    rounded = NearestRounding().round(rows, WeightGrid(bits))
    if form is TokenTable.FOLDED:
        store_scaled(model, {name_of(table): (rounded, 0)})
    else:
        _store_packed(model, gather, table, rounded)
    return bits


def find_token_table(graph: ir.Graph) -> ir.Node | None:
    """The Gather that looks token ids up in a float or float16 table of more than one column; None without one."""
    for gather in nodes_of(graph, "Gather"):
        table, ids = gather.inputs[:2]
        if table is None or ids is None or not ids.is_graph_input() or is_constant(ids):
            continue
        shape = dims(table) or ()
        if len(shape) == 2 and shape[1] > 1 and table.dtype in (ir.DataType.FLOAT, ir.DataType.FLOAT16):
            return gather
    return None


def _store_packed(model: ir.Model, gather: ir.Node, table: ir.Value, weight: QuantizedWeight) -> None:
    """Gather -> Cast -> Mul(Gather(scale)), for the looked-up rows only; 4-bit ones are unpacked on the way."""
    graph, name, ids = model.graph, name_of(table), gather.inputs[1]
    packed = weight.num_bits == 4
    integers = set_constant(graph, f"{name}_quantized", pack_halves(weight.integers) if packed else weight.integers)
    scales = set_constant(graph, f"{name}_scale", weight.scale[:, None].astype(np.float32))
    rows = node("Gather", [integers, ids], f"{name}_rows", name=f"{name}_gather", attributes={"axis": 0})
    nodes = [rows]
    if packed:
        nodes += _unpack_halves(graph, rows.outputs[0], f"{name}_rows_float")
    else:
        to = {"to": ir.DataType.FLOAT}
        nodes.append(node("Cast", rows.outputs, f"{name}_rows_float", name=f"{name}_cast_float", attributes=to))
    real = nodes[-1].outputs[0]
    scale = node("Gather", [scales, ids], f"{name}_row_scale", name=f"{name}_gather_scale", attributes={"axis": 0})
    nodes += [scale, node("Mul", [real, scale.outputs[0]], f"{name}_looked_up", name=f"{name}_dequantize")]
    insert_before(graph, gather, nodes)
    take_over(gather.outputs[0], nodes[-1].outputs[0])
    drop_unused(model)


def pack_halves(values: np.ndarray) -> np.ndarray:
    """Two values a byte, offset by 8: the left half of each row in the low nibbles, the right half in the high ones.

    So a row is unpacked by whole vectors, without interleaving.

    Args:
        values: integers in [-8, 7], [rows, width], of even width.

    Returns:
        uint8 [rows, width / 2].
    """
    left, right = np.split((np.asarray(values, np.int8) + 8).astype(np.uint8), 2, axis=1)
    return left | (right << 4)


def _unpack_halves(graph: ir.Graph, rows: ir.Value, output: str) -> list[ir.Node]:
    """uint8 [..., width / 2] as `pack_halves` makes it -> float32 [..., width]."""
    mask, shift, zero = (
        set_constant(graph, name, np.array(value))
        for name, value in (("low_nibble", np.uint8(15)), ("nibble_bits", np.uint8(4)), ("nibble_zero", np.float32(8)))
    )
    name = name_of(rows)
    low = node("BitwiseAnd", [rows, mask], f"{name}_low")
    high = node("BitShift", [rows, shift], f"{name}_high", attributes={"direction": "RIGHT"})
    both = node("Concat", [low.outputs[0], high.outputs[0]], f"{name}_both", attributes={"axis": -1})
    unsigned = node("Cast", both.outputs, f"{name}_unsigned", attributes={"to": ir.DataType.FLOAT})
    return [low, high, both, unsigned, node("Sub", [unsigned.outputs[0], zero], output)]
