"""The forms of paths through a trellis: how the weights of `graph.trellis` lie in a file.

Bytes, the bits before and the multiplier together are a row of one table of pairs of levels. onnxruntime keeps what
every node makes until the last one is folded, in memory that nothing used before: loading takes as long as these
tensors are large, so only the numbers of rows are wider than a byte.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from itertools import count
from math import prod

import numpy as np
import onnx_ir as ir

from d4c_onnx.errors import GraphError
from d4c_onnx.graph.lookups import input_of, is_table, look_up, looked_up, reshaped, shape_constant, takes_rows
from d4c_onnx.graph.packing import pack_int4, unpack_uint4
from d4c_onnx.graph.trellis import PATH_BITS, PLANES, RATES, Coded, level_numbers, row_numbers, shifted
from d4c_onnx.graph.values import attribute, constant, dims, is_constant, is_op, maker, node, prepend, set_constant

Add = Callable[..., ir.Value]  # (operator, inputs, letter, attributes) -> its output


class Trellis:
    """Codes of 4 bits: bytes [groups, inputs of a group / 2, channels], each of two neighbouring inputs of a channel.

    Concat of the bytes, of their bits of the path (BitwiseAnd), of the last such row of the group before (Slice -> Pad)
    and of the multipliers, looked up as nibbles are -> MatMulInteger, which makes them row numbers -> Gather from the
    table of levels -> Transpose -> Reshape.
    """

    name, num_bits, opset, minimum_onnxruntime = "trellis", 4, 18, "1.15"
    _repeats = 1  # of the multipliers among the columns
    _suffix = ""  # of the names of constants

    def find(self, integers: ir.Value) -> ir.Value | None:
        parts = self._parts(integers)
        return None if parts is None else parts[0][0]

    def unpack(self, integers: ir.Value) -> np.ndarray:
        return self.coded(integers).levels

    def shape(self, integers: ir.Value) -> tuple[int, ...]:
        return reshaped(integers)

    def coded(self, integers: ir.Value) -> Coded:
        """Codes and multipliers of a value that lies in this form."""
        parts = self._parts(integers)
        assert parts is not None
        stored, places, axis = parts
        multipliers = unpack_uint4(constant(looked_up(places, _places())).tobytes(), reshaped(places))
        return self._coded([constant(value) for value in stored], multipliers, axis)

    def multipliers(self, integers: ir.Value) -> int:
        parts = self._parts(integers)
        return 0 if parts is None else prod(reshaped(parts[1]))

    def store(self, graph: ir.Graph, name: str, values: np.ndarray) -> ir.Value:
        raise GraphError(f"{name}: integers are no path through a trellis. Round the weight anew.")

    def store_coded(self, graph: ir.Graph, name: str, values: Coded) -> ir.Value:
        """`store` of a path.

        Eleven nodes a weight, and up to six more: their names are short, because small models notice.
        """
        multipliers = values.multiplier_rows
        prefix, nodes = _unused_prefix(graph), list[ir.Node]()

        def add(op: str, given: list[ir.Value], letter: str, **attributes: object) -> ir.Value:
            nodes.append(node(op, given, f"{prefix}{letter}", attributes=attributes))
            return nodes[-1].outputs[0]

        def told(word: str, numbers: np.ndarray) -> ir.Value:
            return set_constant(graph, f"~{word}", numbers)

        small = set_constant(graph, f"{prefix}m", np.frombuffer(pack_int4(multipliers), np.uint8))
        nodes += look_up(graph, small, told("m", _places()), multipliers.shape, f"{prefix}s")
        places = nodes[-1].outputs[0]
        codes, path = self._store_codes(graph, prefix, values, add)
        cut = [told(letter, numbers) for letter, numbers in _LAST_ROWS.items()]
        last = add("Pad", [add("Slice", [path, *cut], "b"), told("z", _ONE_GROUP)], "c")
        columns = add("Concat", [codes, path, last, *[places] * self._repeats], "d", axis=1)
        rows = values.codes.shape[1] // values.multipliers.shape[1] // 2
        product = row_numbers(rows, self.num_bits)
        numbers = add("MatMulInteger", [told(f"c{self._suffix}{rows}", product), columns], "e")
        table = self._level_table(graph)
        pairs = add("Gather", [table, numbers], "f", axis=0)
        turned = add("Transpose", [pairs], "g", perm=_PERMS[values.axis])
        nodes.append(node("Reshape", [turned, shape_constant(graph, values.shape)], name))
        prepend(graph, nodes)
        _to_the_front(graph, table)
        return nodes[-1].outputs[0]

    def _store_codes(self, graph: ir.Graph, prefix: str, values: Coded, add: Add) -> tuple[ir.Value, ir.Value]:
        """What stands for the codes among the columns, and their bits of the path."""
        stored = set_constant(graph, f"{prefix}p", values.bytes)
        return stored, add("BitwiseAnd", [stored, set_constant(graph, "~b", _PATH)], "a")

    def _codes_of(self, codes: ir.Value, path: ir.Value) -> list[ir.Value] | None:
        """What is in the file, of what `_store_codes` gave; None where something else made it."""
        masked = maker(path)
        known = masked is not None and is_op(masked, "BitwiseAnd") and masked.inputs[0] is codes
        known = known and masked is not None and is_table(masked.inputs[1], _PATH)
        return [codes] if known and _is_stored(codes) else None

    def _coded(self, stored: Sequence[np.ndarray], multipliers: np.ndarray, axis: int) -> Coded:
        return Coded.of_bytes(stored[0], multipliers, axis)

    def _parts(self, integers: ir.Value) -> tuple[list[ir.Value], ir.Value, int] | None:
        """What the codes lie in, the shifted multipliers, and the axis of the channels."""
        turned = maker(input_of(integers, "Reshape"))
        if turned is None or not is_op(turned, "Transpose") or attribute(turned, "perm") not in _PERMS:
            return None
        gather = maker(turned.inputs[0])
        if gather is None or not takes_rows(gather) or not self._is_level_table(gather.inputs[0]):
            return None
        product = maker(gather.inputs[1])
        if product is None or not is_op(product, "MatMulInteger") or len(product.inputs) != 2:  # no zero points
            return None
        coefficients, joined = product.inputs[0], maker(product.inputs[1])
        if joined is None or not is_op(joined, "Concat") or attribute(joined, "axis") != 1:
            return None
        codes, path, last, *places = joined.inputs
        if len(places) != self._repeats or len(set(places)) != 1 or places[0] is None:
            return None
        if codes is None or path is None or not _is_last_of(path, last):
            return None
        stored = self._codes_of(codes, path)
        whole, shape = reshaped(integers), reshaped(places[0])
        if stored is None or len(shape) != 3 or 0 in shape or len(whole) != 2:
            return None
        axis = _PERMS.index(attribute(turned, "perm"))
        groups, channels = shape[0], shape[2]
        rows = whole[1 - axis] // groups // 2
        fits = whole[axis] == channels and whole[1 - axis] == 2 * groups * rows
        fits = fits and dims(codes) in (None, (groups, rows, channels)) and self._fits(stored, groups, rows, channels)
        known = is_table(coefficients, row_numbers(rows, self.num_bits)) if fits else False
        known = known and _are_multipliers(places[0], (groups, 1, channels))
        return (stored, places[0], axis) if known else None

    def _fits(self, stored: Sequence[ir.Value], groups: int, rows: int, channels: int) -> bool:
        """Whether what is in the file has the shapes of so many groups of so many pairs."""
        return dims(stored[0]) == (groups, rows, channels)

    def _level_table(self, graph: ir.Graph) -> ir.Value:
        """The two levels of every row, int8, made when the file is loaded: 32 KB and more are much to a small model.

        Gather of levels, by their numbers (Add of what places and the path say), for each multiplier -> Reshape.
        """
        for entry in graph:
            if self._is_level_table(entry.outputs[0]):
                return entry.outputs[0]
        of = self._suffix
        levels = set_constant(graph, f"~l{of}", RATES[self.num_bits].levels)
        nodes = []
        for letter, numbers in zip("no", level_numbers(self.num_bits), strict=True):
            small = set_constant(graph, f"~{letter}{of}", numbers)
            nodes.append(node("Cast", [small], f"~t{of}{letter}", attributes={"to": ir.DataType.INT32}))
        nodes.append(node("Add", [entry.outputs[0] for entry in nodes], f"~t{of}0"))
        nodes.append(node("Gather", [levels, nodes[-1].outputs[0]], f"~t{of}1", attributes={"axis": 1}))
        nodes.append(node("Reshape", [nodes[-1].outputs[0], shape_constant(graph, (-1, 2))], f"~t{of}"))
        prepend(graph, nodes)
        return nodes[-1].outputs[0]

    def _is_level_table(self, value: ir.Value | None) -> bool:
        gather = maker(input_of(value, "Reshape"))
        if value is None or gather is None or not is_op(gather, "Gather") or attribute(gather, "axis", 0) != 1:
            return False
        added = maker(gather.inputs[1])
        if added is None or not is_op(added, "Add") or reshaped(value) != (-1, 2):
            return False
        parts = [input_of(part, "Cast") for part in added.inputs]
        known = is_table(gather.inputs[0], RATES[self.num_bits].levels)
        return known and all(map(is_table, parts, level_numbers(self.num_bits)))


class _Planes(Trellis):
    """Codes of 3 or 5 bits in two planes: places, and bits of the path, several pairs of inputs a byte.

    Each plane but that of places of 8 bits is masked, shifted and reshaped, a row a pair; the bits of the path stand
    among the columns as they are. No bit is shifted out: OpenVINO divides instead, and rounds to nearest. The
    multipliers are there twice (`row_numbers`).
    """

    _repeats = 2

    def __init__(self, num_bits: int) -> None:
        self.name, self.num_bits, self._suffix = f"trellis{num_bits}", num_bits, f"{num_bits}r"

    def _store_codes(self, graph: ir.Graph, prefix: str, values: Coded, add: Add) -> tuple[ir.Value, ir.Value]:
        places, path = values.planes
        stored, bits = set_constant(graph, f"{prefix}p", places), set_constant(graph, f"{prefix}q", path)
        groups, _, _, channels = path.shape

        def spread(value: ir.Value, pairs: int, letters: str) -> ir.Value:
            masks = set_constant(graph, f"~k{pairs}", _masks(pairs))
            by = set_constant(graph, f"~h{pairs}", _shifts(pairs))
            kept = add("BitwiseAnd", [value, masks], letters[0])
            moved = add("BitShift", [kept, by], letters[1], direction="RIGHT")
            return add("Reshape", [moved, shape_constant(graph, (groups, -1, channels))], letters[2])

        return stored if self.num_bits == 5 else spread(stored, 2, "hij"), spread(bits, 4, "kln")

    def _codes_of(self, codes: ir.Value, path: ir.Value) -> list[ir.Value] | None:
        stored, bits = codes if self.num_bits == 5 else _spread_of(codes, 2), _spread_of(path, 4)
        if stored is None or bits is None or not _is_stored(stored):
            return None
        return [stored, bits]

    def _coded(self, stored: Sequence[np.ndarray], multipliers: np.ndarray, axis: int) -> Coded:
        return Coded.of_planes(stored[0], stored[1], multipliers, axis, self.num_bits)

    def _fits(self, stored: Sequence[ir.Value], groups: int, rows: int, channels: int) -> bool:
        places = (groups, rows, channels) if self.num_bits == 5 else (groups, rows // 2, 1, channels)
        return rows % 4 == 0 and dims(stored[0]) == places and dims(stored[1]) == (groups, rows // 4, 1, channels)


def _shifts(pairs: int) -> np.ndarray:
    """Where the bits of each of several pairs begin in a byte, uint8 [pairs, 1]."""
    return (8 // pairs * np.arange(pairs, dtype=np.uint8))[:, None]


def _masks(pairs: int) -> np.ndarray:
    """Of each pair's bits, where they are, uint8 [pairs, 1]."""
    lowest = np.array(2 ** (8 // pairs) - 1, np.uint8)
    return lowest << _shifts(pairs)


def _spread_of(value: ir.Value, pairs: int) -> ir.Value | None:
    """The bytes in the file whose pairs a value holds row by row."""
    moved = maker(input_of(value, "Reshape"))
    if moved is None or not is_op(moved, "BitShift") or attribute(moved, "direction") != "RIGHT":
        return None
    masked = maker(moved.inputs[0])
    if masked is None or not is_op(masked, "BitwiseAnd") or not is_table(moved.inputs[1], _shifts(pairs)):
        return None
    stored = masked.inputs[0]
    return stored if _is_stored(stored) and is_table(masked.inputs[1], _masks(pairs)) else None


def _is_stored(value: ir.Value | None) -> bool:
    return value is not None and is_constant(value) and value.dtype == ir.DataType.UINT8


TRELLIS = Trellis()
TRELLISES: dict[int, Trellis] = {4: TRELLIS, **{num_bits: _Planes(num_bits) for num_bits in PLANES}}


# from [groups, rows, channels, 2], by the axis of the channels in the matrix
_PERMS = ([2, 0, 1, 3], [0, 1, 3, 2])
_PATH = np.array([PATH_BITS], np.uint8)
# of every group but the last one; one more before them
_LAST_ROWS = {"s": np.array([0, -1]), "e": np.array([-1, np.iinfo(np.int32).max]), "x": np.array([0, 1])}
_ONE_GROUP = np.array([1, 0, 0, 0, 0, 0])


def _is_last_of(path: ir.Value, last: ir.Value | None) -> bool:
    """Whether a value is the last row of another's groups, one group later."""
    padded = maker(last)
    cut = maker(padded.inputs[0]) if padded is not None and is_op(padded, "Pad") else None
    if padded is None or cut is None or not is_op(cut, "Slice"):
        return False
    known = cut.inputs[0] is path and len(cut.inputs) == 1 + len(_LAST_ROWS)
    known = known and all(map(is_table, cut.inputs[1:], _LAST_ROWS.values()))
    zeros = len(padded.inputs) == 2 and attribute(padded, "mode", "constant") == "constant"
    return known and zeros and is_table(padded.inputs[1], _ONE_GROUP)


def _are_multipliers(places: ir.Value, shape: tuple[int, ...]) -> bool:
    """Whether a value of that shape is looked up from as many nibbles."""
    nibbles = looked_up(places, _places())
    return reshaped(places) == shape and nibbles is not None and dims(nibbles) == (-(-prod(shape) // 2),)


def _to_the_front(graph: ir.Graph, value: ir.Value) -> None:
    """Let the nodes that make a value from constants come before all others."""
    chain: list[ir.Node] = []
    queue = [maker(value)]
    while queue:
        made = queue.pop()
        if made is not None:
            chain.insert(0, made)
            queue += [maker(part) for part in made.inputs]
    for entry in chain:
        graph.remove(entry)
    prepend(graph, chain)


def _unused_prefix(graph: ir.Graph) -> str:
    """`~` and a number, for the names of one weight's values."""
    return next(f"~{number}" for number in count() if f"~{number}p" not in graph.initializers)


def _places() -> np.ndarray:
    """Of every byte, its two multipliers as the product of row numbers wants them, uint8 [256, 2]."""
    return shifted(unpack_uint4(np.arange(256, dtype=np.uint8).tobytes(), (256, 2)))
