"""The form of paths through a trellis: how the weights of `graph.trellis` lie in a file.

A byte, the bits before and the multiplier together are a row of one table of pairs, [16384, 2]. onnxruntime keeps what
every node makes until the last one is folded, in memory that nothing used before: loading takes as long as these
tensors are large, so only the numbers of rows are wider than a byte.
"""

from __future__ import annotations

from itertools import count
from math import prod

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.lookups import input_of, is_table, look_up, looked_up, reshaped, shape_constant, takes_rows
from d4c_onnx.graph.packing import pack_int4, unpack_uint4
from d4c_onnx.graph.trellis import LEVELS, PATH_BITS, Coded, level_numbers, row_numbers, shifted
from d4c_onnx.graph.values import attribute, constant, dims, is_constant, is_op, maker, node, prepend, set_constant


class Trellis:
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
        return reshaped(integers)

    def coded(self, integers: ir.Value) -> Coded:
        """Nibbles and multipliers of a value that lies in this form."""
        parts = self._parts(integers)
        assert parts is not None
        stored, places, axis = parts
        multipliers = unpack_uint4(constant(looked_up(places, _places())).tobytes(), reshaped(places))
        return Coded.of_bytes(constant(stored), multipliers, axis)

    def multipliers(self, integers: ir.Value) -> int:
        parts = self._parts(integers)
        return 0 if parts is None else prod(reshaped(parts[1]))

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
        nodes += look_up(graph, small, told("m", _places()), multipliers.shape, f"{prefix}s")
        places = nodes[-1].outputs[0]
        path = add("BitwiseAnd", [stored, told("b", _PATH)], "a")
        cut = [told(letter, numbers) for letter, numbers in _LAST_ROWS.items()]
        last = add("Pad", [add("Slice", [path, *cut], "b"), told("z", _ONE_GROUP)], "c")
        columns = add("Concat", [stored, path, last, places], "d", axis=1)
        numbers = add("MatMulInteger", [told(f"c{rows}", row_numbers(rows)), columns], "e")
        table = _level_table(graph)
        pairs = add("Gather", [table, numbers], "f", axis=0)
        turned = add("Transpose", [pairs], "g", perm=_PERMS[values.axis])
        nodes.append(node("Reshape", [turned, shape_constant(graph, values.shape)], name))
        prepend(graph, nodes)
        _to_the_front(graph, table)
        return nodes[-1].outputs[0]

    def _parts(self, integers: ir.Value) -> tuple[ir.Value, ir.Value, int] | None:
        """Bytes, the shifted multipliers, and the axis of the channels."""
        turned = maker(input_of(integers, "Reshape"))
        if turned is None or not is_op(turned, "Transpose") or attribute(turned, "perm") not in _PERMS:
            return None
        gather = maker(turned.inputs[0])
        if gather is None or not takes_rows(gather) or not _is_level_table(gather.inputs[0]):
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
        shape, whole = dims(stored) or (), reshaped(integers)
        axis = _PERMS.index(attribute(turned, "perm"))
        if len(shape) != 3 or 0 in shape or len(whole) != 2 or dims(coefficients) != (shape[1], 2 * shape[1] + 2):
            return None
        groups, rows, channels = shape
        fits = whole[axis] == channels and whole[1 - axis] == 2 * groups * rows
        known = is_table(coefficients, row_numbers(rows)) and _are_multipliers(places, (groups, 1, channels))
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
    known = known and masked.inputs[0] is stored and is_table(masked.inputs[1], _PATH)
    known = known and cut.inputs[0] is path and len(cut.inputs) == 1 + len(_LAST_ROWS)
    known = known and all(map(is_table, cut.inputs[1:], _LAST_ROWS.values()))
    zeros = len(padded.inputs) == 2 and attribute(padded, "mode", "constant") == "constant"
    return known and zeros and is_table(padded.inputs[1], _ONE_GROUP)


def _are_multipliers(places: ir.Value, shape: tuple[int, ...]) -> bool:
    """Whether a value of that shape is looked up from as many nibbles."""
    nibbles = looked_up(places, _places())
    return reshaped(places) == shape and nibbles is not None and dims(nibbles) == (-(-prod(shape) // 2),)


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
    nodes.append(node("Reshape", [nodes[-1].outputs[0], shape_constant(graph, (-1, 2))], "~t"))
    prepend(graph, nodes)
    return nodes[-1].outputs[0]


def _is_level_table(value: ir.Value | None) -> bool:
    gather = maker(input_of(value, "Reshape"))
    if value is None or gather is None or not is_op(gather, "Gather") or attribute(gather, "axis", 0) != 1:
        return False
    known = is_table(gather.inputs[0], LEVELS) and is_table(input_of(gather.inputs[1], "Cast"), level_numbers())
    return known and reshaped(value) == (-1, 2)


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
