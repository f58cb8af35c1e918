"""How quantised values lie in the file.

onnxruntime has no CPU kernel for int4 weights with int8 activations: stored as plain int4 QDQ (`native`, what
compilers want), a layer is dequantised and multiplied in float, three times slower than FP32. Two layouts reach the
int8 kernels at half the bytes, because onnxruntime folds what unpacks them when it loads the file:

- `cast`: an INT4 initialiser and a `Cast` to INT8. Needs opset 21 and onnxruntime 1.23.
- `nibbles`: two values a uint8, looked up in a table of 256 pairs of int8 (`Gather`). Any opset, onnxruntime 1.20.
  Unpacked by bit operations instead, the weights would be uint8 with zero point 8, and onnxruntime 1.32 multiplies
  those at half the speed of int8 ones.

Where activations stay in float16, no kernel wants integers at all: `store_scaled` unpacks them to the float graph.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper, numpy_helper

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.bits import NIBBLE_TABLE
from d4c_onnx.graph.files import raise_opset
from d4c_onnx.graph.index import GraphIndex, drop_unused, replace_nodes, set_initializer
from d4c_onnx.graph.layers import channels_back
from d4c_onnx.quantization.rounding import QuantizedWeight

INT4_OPSET = 21
# The oldest releases that were tried; None: without 4-bit weights; attention: with the standard operator.
MINIMUM_ORT = {"cast": "1.23", "native": "1.20", "nibbles": "1.20", "attention": "1.24", None: "1.20"}


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


def int4_initializer(name: str, values: np.ndarray) -> onnx.TensorProto:
    """An INT4 TensorProto of int8 values in [-8, 7]."""
    return TensorProto(name=name, data_type=TensorProto.INT4, dims=values.shape, raw_data=pack_int4(values))


def store_int4(model: onnx.ModelProto, names: Iterable[str], layout: str = "cast") -> int:
    """Store int8 initialisers in 4 bits, in place; returns how many.

    Args:
        names: initialisers whose values all lie in [-8, 7].
        layout: cast, native (for those that a DequantizeLinear reads) or nibbles.
    """
    graph = model.graph
    index = GraphIndex(graph)
    unique = list(dict.fromkeys(names))
    nodes: list[onnx.NodeProto] = []
    for name in unique:
        values = index.constant(name)
        if layout == "nibbles":
            nodes += _nibbles(graph, index, name, values)
        elif layout == "native":
            index.initializers[name].CopyFrom(int4_initializer(name, values))
            readers = [node for node in index.consumers[name] if node.op_type == "DequantizeLinear"]
            for zero in {node.input[2] for node in readers if len(node.input) > 2}:
                shape = tuple(index.initializers[zero].dims)
                index.initializers[zero].CopyFrom(int4_initializer(zero, np.zeros(shape, np.int8)))
        else:
            stored = f"{name}_int4"
            index.initializers[name].CopyFrom(int4_initializer(stored, values))
            nodes.append(helper.make_node("Cast", [stored], [name], name=f"{name}_cast", to=TensorProto.INT8))
    replace_nodes(graph, [*nodes, *graph.node])
    if unique and layout != "nibbles":
        raise_opset(model, INT4_OPSET)
    return len(unique)


def _nibbles(graph: onnx.GraphProto, index: GraphIndex, name: str, values: np.ndarray) -> list[onnx.NodeProto]:
    """Cast(uint8 -> int32) -> Gather from the table of pairs -> Reshape; a last odd value is sliced off."""
    bytes_ = np.arange(256, dtype=np.uint8)
    set_initializer(graph, NIBBLE_TABLE, unpack_int4(bytes_.tobytes(), (256, 2)))
    packed, shape = f"{name}_nibbles", f"{name}_shape"
    index.initializers[name].CopyFrom(numpy_helper.from_array(np.frombuffer(pack_int4(values), np.uint8), packed))
    set_initializer(graph, shape, np.array(values.shape, np.int64))
    rows, pairs, flat = f"{packed}_rows", f"{packed}_pairs", f"{packed}_flat"
    nodes = [
        helper.make_node("Cast", [packed], [rows], name=rows, to=TensorProto.INT32),
        helper.make_node("Gather", [NIBBLE_TABLE, rows], [pairs], name=pairs, axis=0),
    ]
    if values.size % 2:
        for constant, value in (("nibble_line", -1), ("nibble_start", 0)):
            set_initializer(graph, constant, np.array([value], np.int64))
        end, line = f"{packed}_end", f"{packed}_line"
        set_initializer(graph, end, np.array([values.size], np.int64))
        nodes.append(helper.make_node("Reshape", [pairs, "nibble_line"], [line], name=line))
        nodes.append(helper.make_node("Slice", [line, "nibble_start", end], [flat], name=flat))
        pairs = flat
    return [*nodes, helper.make_node("Reshape", [pairs, shape], [name], name=f"{name}_unpack")]


def store_scaled(model: onnx.ModelProto, weights: Mapping[str, tuple[QuantizedWeight, int]]) -> None:
    """Store float initialisers as integers that are unpacked when the file is loaded, in place.

    integers -> Cast to float32 -> Mul by one scale a channel (-> Cast to float16, where the initialiser was that):
    standard operators of constants, which onnxruntime folds. What runs is the float graph.

    Args:
        weights: per initialiser its grid, and the axis of its channels; 4-bit ones are stored in INT4.
    """
    graph = model.graph
    index = GraphIndex(graph)
    nodes: list[onnx.NodeProto] = []
    for name, (weight, axis) in weights.items():
        tensor = index.initializers[name]
        shape, kept = tuple(tensor.dims), tensor.data_type
        integers = channels_back(weight.integers, shape, axis)
        stored, scale = f"{name}_quantized", f"{name}_scale"
        packed = (
            int4_initializer(stored, integers) if weight.num_bits == 4 else numpy_helper.from_array(integers, stored)
        )
        tensor.CopyFrom(packed)
        line = [-1 if position == axis else 1 for position in range(len(shape))]
        set_initializer(graph, scale, weight.scale.reshape(line).astype(np.float32))
        real, scaled = f"{name}_integers", name if kept == TensorProto.FLOAT else f"{name}_scaled"
        nodes.append(helper.make_node("Cast", [stored], [real], name=real, to=TensorProto.FLOAT))
        nodes.append(helper.make_node("Mul", [real, scale], [scaled], name=f"{name}_dequantize"))
        if scaled != name:
            nodes.append(helper.make_node("Cast", [scaled], [name], name=f"{name}_cast", to=kept))
    replace_nodes(graph, [*nodes, *graph.node])
    if any(weight.num_bits == 4 for weight, _ in weights.values()):
        raise_opset(model, INT4_OPSET)


def omit_zero_points(model: onnx.ModelProto, names: Iterable[str]) -> None:
    """Drop the zero points of symmetric weights that products read, in place.

    ONNX takes an absent one as 0. Given one zero per channel, onnxruntime's product corrects each channel for it.

    Args:
        names: int8 initialisers.
    """
    index = GraphIndex(model.graph)
    for name in names:
        for node in index.consumers.get(name, []):
            products = all(reader.op_type == "MatMul" for reader in index.consumers[node.output[0]])
            zero = index.array(node.input[2]) if len(node.input) > 2 else None
            if node.op_type == "DequantizeLinear" and products and zero is not None and not zero.any():
                del node.input[2]
    drop_unused(model.graph)


def find_token_table(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, str] | None:
    """The Gather that looks token ids up, and its float or float16 table; None when the encoder has none."""
    index = GraphIndex(graph)
    for node in graph.node:
        if node.op_type == "Gather" and node.input[1] in index.inputs:
            table = index.initializers.get(node.input[0])
            if (
                table is not None
                and len(table.dims) == 2
                and table.data_type in (TensorProto.FLOAT, TensorProto.FLOAT16)
            ):
                return node, table.name
    return None


def store_token_table(model: onnx.ModelProto, gather: onnx.NodeProto, table: str, weight: QuantizedWeight) -> None:
    """Store the token table as integers with one scale per row, in place.

    Only the looked-up rows are dequantised: Gather -> Cast -> Mul(Gather(scale)). A DequantizeLinear of the whole table
    would run over all 49,408 rows for every query. 4-bit rows stay packed in memory, too, and only those looked up are
    unpacked: a Cast of the whole table would be folded at load, at the cost of loading time and twice the memory.

    Args:
        gather: the node that reads the table (of this model's graph).
        table: the float table's name, [vocabulary, width].
        weight: rows as channels; of even width at 4 bits.
    """
    graph = model.graph
    integers, scales = f"{table}_quantized", f"{table}_scale"
    rows, row_scale, real = f"{table}_rows", f"{table}_row_scale", f"{table}_rows_float"
    ids, result = gather.input[1], gather.output[0]
    packed = weight.num_bits == 4
    set_initializer(graph, integers, pack_halves(weight.integers) if packed else weight.integers)
    set_initializer(graph, scales, weight.scale[:, None].astype(np.float32))
    nodes = [helper.make_node("Gather", [integers, ids], [rows], name=f"{table}_gather", axis=0)]
    if packed:
        nodes += _unpack_halves(graph, rows, real)
    else:
        nodes.append(helper.make_node("Cast", [rows], [real], name=f"{table}_cast_float", to=TensorProto.FLOAT))
    nodes += [
        helper.make_node("Gather", [scales, ids], [row_scale], name=f"{table}_gather_scale", axis=0),
        helper.make_node("Mul", [real, row_scale], [result], name=f"{table}_dequantize"),
    ]
    position = next(number for number, node in enumerate(graph.node) if node.name == gather.name)
    replace_nodes(graph, [*graph.node[:position], *nodes, *graph.node[position + 1 :]])
    drop_unused(graph)


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


def _unpack_halves(graph: onnx.GraphProto, rows: str, real: str) -> list[onnx.NodeProto]:
    """uint8 [..., width / 2] as `pack_halves` makes it -> float32 [..., width]."""
    for name, value in (("low_nibble", np.uint8(15)), ("nibble_bits", np.uint8(4)), ("nibble_zero", np.float32(8))):
        set_initializer(graph, name, np.array(value))
    low, high, both, unsigned = (f"{rows}_{part}" for part in ("low", "high", "both", "unsigned"))
    return [
        helper.make_node("BitwiseAnd", [rows, "low_nibble"], [low], name=low),
        helper.make_node("BitShift", [rows, "nibble_bits"], [high], name=high, direction="RIGHT"),
        helper.make_node("Concat", [low, high], [both], name=both, axis=-1),
        helper.make_node("Cast", [both], [unsigned], name=unsigned, to=TensorProto.FLOAT),
        helper.make_node("Sub", [unsigned, "nibble_zero"], [real], name=real),
    ]


def clip_activations(model: onnx.ModelProto, ranges: Mapping[str, QuantParams]) -> int:
    """Confine narrow activations to their grid, in place: a 6-bit scale alone would let uint8 run on to 255.

    A Clip goes before each QuantizeLinear whose value has a range narrower than 8 bits; returns how many.
    """
    graph = model.graph
    narrow = {name: params for name, params in ranges.items() if params.num_bits < 8}
    clips: list[tuple[int, onnx.NodeProto]] = []
    for position, node in enumerate(graph.node):
        if node.op_type == "QuantizeLinear" and node.input[0] in narrow:
            value = node.input[0]
            for suffix, limit in zip(("low", "high"), narrow[value].range, strict=True):
                set_initializer(graph, f"{value}_{suffix}", np.array(limit, np.float32))
            names = [value, f"{value}_low", f"{value}_high"]
            clip = helper.make_node("Clip", names, [f"{value}_clipped"], name=f"{value}_clip")
            node.input[0] = clip.output[0]
            clips.append((position, clip))
    for position, clip in reversed(clips):
        graph.node.insert(position, clip)
    return len(clips)
