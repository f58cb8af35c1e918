"""Bytes that files look up in tables of pairs: what the forms of 4-bit weights have in common."""

from math import prod

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.values import array, attribute, is_constant, is_op, maker, name_of, node, set_constant, walk_back


def input_of(value: ir.Value | None, op: str) -> ir.Value | None:
    """The first input of the operator that makes a value; None where another one does."""
    made = maker(value)
    return made.inputs[0] if made is not None and is_op(made, op) else None


def takes_rows(made: ir.Node) -> bool:
    return is_op(made, "Gather") and attribute(made, "axis", 0) == 0


def reshaped(value: ir.Value) -> tuple[int, ...]:
    """The shape that a Reshape gives a value; none where nothing does."""
    made = maker(value)
    shape = array(made.inputs[1]) if made is not None and is_op(made, "Reshape") else None
    return () if shape is None else tuple(int(size) for size in shape)


def is_table(value: ir.Value | None, table: np.ndarray) -> bool:
    known = array(value)
    return known is not None and known.dtype == table.dtype and np.array_equal(known, table)


def looked_up(value: ir.Value, table: np.ndarray) -> ir.Value | None:
    """The bytes whose rows of a table a value is made of."""
    made = maker(walk_back(value, "Reshape", "Slice"))
    if made is None or made is maker(value) or not takes_rows(made):
        return None
    stored = walk_back(made.inputs[1], "Cast")
    return stored if is_constant(stored) and is_table(made.inputs[0], table) else None


def look_up(graph: ir.Graph, stored: ir.Value, table: ir.Value, shape: tuple[int, ...], name: str) -> list[ir.Node]:
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
    target = shape_constant(graph, shape)
    nodes.append(node("Reshape", [nodes[-1].outputs[0], target], name, name=f"{name}_unpack"))
    return nodes


def shape_constant(graph: ir.Graph, shape: tuple[int, ...]) -> ir.Value:
    """A constant that all reshapes to that shape share."""
    name = "~" + ".".join("" if size < 0 else str(size) for size in shape)
    return set_constant(graph, name, np.array(shape, np.int64))
