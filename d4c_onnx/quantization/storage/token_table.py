"""The token table: integers with a scale a row, in the form that the target can read.

- `PACKED`: integers that stay packed in memory; only looked-up rows are unpacked. In 4 bits, groups of a
  row's values have multipliers: with one step for the whole row the table cost a text tower of really trained weights
  as much as all its matrices together. A DequantizeLinear of the whole table
  would run over all 49,408 rows for every query, and a Cast of it would be folded at load, at the cost of loading time
  and twice the memory.
- `FOLDED`: integers that are unpacked when the file is loaded, for the CUDA provider has no bit operations.
- `FLOAT`: as it is, for TensorRT's parser takes neither.
"""

from enum import Enum

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.model import drop_unused
from d4c_onnx.graph.token_table import find_token_table
from d4c_onnx.graph.values import constant, insert_before, name_of, node, set_constant, take_over
from d4c_onnx.quantization.rounding.base import QuantizedWeight
from d4c_onnx.quantization.rounding.token_rows import TokenRows, round_token_rows
from d4c_onnx.quantization.storage.weights import store_scaled


class TokenTable(Enum):
    """How a target wants it."""

    PACKED = "packed"
    FOLDED = "folded"
    FLOAT = "float"


def store_token_table(
    model: ir.Model, num_bits: int, form: TokenTable, group_size: int = 0, outputs: np.ndarray | None = None
) -> float | None:
    """Round the token table and store it, in place.

    Args:
        num_bits: 4 or 8; a packed table of odd width gets 8.
        group_size: of a packed table of 4 bits; 0: one scale a row, as where groups do not fill bytes.
        outputs: see `round_token_rows`.

    Returns:
        Its bits, multipliers of groups included; None where there is no table, or it stays as it is.
    """
    gather = None if form is TokenTable.FLOAT else find_token_table(model.graph)
    if gather is None or gather.inputs[0] is None:
        return None
    table = gather.inputs[0]
    if table.dtype == ir.DataType.FLOAT16:  # what unpacks looked-up rows gives float32
        form = TokenTable.FOLDED
    rows = constant(table).astype(np.float32, copy=False)
    packed, width = form is TokenTable.PACKED, rows.shape[1]
    bits = num_bits if not packed or width % 2 == 0 else 8
    size = group_size if packed and bits == 4 and group_size and width % (2 * group_size) == 0 else 0
    rounded = round_token_rows(rows, bits, size, outputs)
    if packed:
        _store_packed(model, gather, table, rounded)
    else:
        store_scaled(model, {name_of(table): (QuantizedWeight(rounded.integers, rounded.scale, bits), 0)})
    return rounded.bits


def _store_packed(model: ir.Model, gather: ir.Node, table: ir.Value, rows: TokenRows) -> None:
    """Gather -> unpacked -> Mul(Gather(scale)), for the looked-up rows only, group by group where those are."""
    graph, name, ids = model.graph, name_of(table), gather.inputs[1]
    nodes: list[ir.Node] = []

    def add(op: str, given: list[ir.Value | None], word: str, **attributes: object) -> ir.Value:
        nodes.append(node(op, given, f"{name}_{word}", attributes=attributes))
        return nodes[-1].outputs[0]

    def looked_up(values: np.ndarray, word: str) -> ir.Value:
        return add("Gather", [set_constant(graph, f"{name}_{word}", values), ids], f"{word}_rows", axis=0)

    def nibbles(values: np.ndarray, word: str) -> ir.Value:
        nodes.extend(_unpack_halves(graph, looked_up(pack_halves(values), word)))
        return nodes[-1].outputs[0]

    def reshaped(value: ir.Value, *after: int) -> ir.Value:
        """The dimensions of ids stay, by zeros."""
        rank = 2 if ids is None or ids.shape is None else len(ids.shape)  # [batch, sequence]
        shape = set_constant(graph, "rows_" + "_".join(map(str, after)), np.array([0] * rank + list(after), np.int64))
        return add("Reshape", [value, shape], f"{name_of(value)}_{len(after)}")

    scale = looked_up(rows.scale[:, None], "scale")
    if rows.num_bits == 8:
        real = add("Cast", [looked_up(rows.integers, "quantized")], "real", to=ir.DataType.FLOAT)
    else:
        integers = nibbles((rows.integers + 8).astype(np.uint8), "quantized")
        zero = set_constant(graph, "nibble_zero", np.array(8 if rows.multipliers is None else 7.5, np.float32))
        real = add("Sub", [integers, zero], "real")
    if rows.multipliers is not None:
        scale = add("Mul", [nibbles(rows.multipliers, "multipliers"), scale], "steps")
        groups = rows.multipliers.shape[1]
        scale, real = reshaped(scale, groups, 1), reshaped(real, groups, rows.integers.shape[1] // groups)
    real = add("Mul", [real, scale], "looked_up")
    if rows.multipliers is not None:
        real = reshaped(real, rows.integers.shape[1])
    insert_before(graph, gather, nodes)
    take_over(gather.outputs[0], real)
    drop_unused(model)


def pack_halves(values: np.ndarray) -> np.ndarray:
    """Two values a byte: the left half of each row in the low nibbles, the right half in the high ones.

    So a row is unpacked by whole vectors, without interleaving.

    Args:
        values: uint8 [rows, width], below 16, of even width.

    Returns:
        uint8 [rows, width / 2].
    """
    left, right = np.split(values, 2, axis=1)
    packed: np.ndarray = left | (right << 4)
    return packed


def _unpack_halves(graph: ir.Graph, rows: ir.Value) -> list[ir.Node]:
    """uint8 [..., width / 2] as `pack_halves` makes it -> float32 [..., width]."""
    low_mask, high_mask, shift = (
        set_constant(graph, word, np.array(value, np.uint8))
        for word, value in (("low_nibble", 0x0F), ("high_nibble", 0xF0), ("nibble_bits", 4))
    )
    name = name_of(rows)
    low = node("BitwiseAnd", [rows, low_mask], f"{name}_low")
    # nothing is shifted out: OpenVINO divides instead, and rounds to nearest
    above = node("BitwiseAnd", [rows, high_mask], f"{name}_above")
    high = node("BitShift", [above.outputs[0], shift], f"{name}_high", attributes={"direction": "RIGHT"})
    both = node("Concat", [low.outputs[0], high.outputs[0]], f"{name}_both", attributes={"axis": -1})
    return [low, above, high, both, node("Cast", both.outputs, f"{name}_float", attributes={"to": ir.DataType.FLOAT})]
