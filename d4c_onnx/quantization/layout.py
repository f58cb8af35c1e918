"""How quantised values lie in the file.

onnxruntime has no CPU kernel for int4 weights with int8 activations: stored as plain int4 QDQ, a layer is dequantised
and multiplied in float, three times slower than FP32. Stored as an INT4 initialiser with a `Cast` to INT8 before the
`DequantizeLinear`, the Cast is folded when the session loads and every int8 kernel fuses: half the bytes, same speed.
Needs opset 21 and onnxruntime 1.23.
"""

from collections.abc import Iterable, Mapping

import numpy as np
import onnx
from onnx import TensorProto, helper

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.files import raise_opset
from d4c_onnx.graph.index import GraphIndex, drop_unused, set_initializer
from d4c_onnx.quantization.rounding import QuantizedWeight

INT4_OPSET = 21
MINIMUM_ORT = {True: "1.23", False: "1.20"}  # with and without int4: the oldest that were tried


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


def store_int4(model: onnx.ModelProto, names: Iterable[str]) -> int:
    """Turn int8 initialisers into INT4 + Cast, in place; returns how many.

    Args:
        names: initialisers whose values all lie in [-8, 7].
    """
    graph = model.graph
    index = GraphIndex(graph)
    casts = []
    for name in dict.fromkeys(names):
        values = index.constant(name)
        stored = f"{name}_int4"
        index.initializers[name].CopyFrom(int4_initializer(stored, values))
        casts.append(helper.make_node("Cast", [stored], [name], name=f"{name}_cast", to=TensorProto.INT8))
    _prepend(graph, casts)
    if casts:
        raise_opset(model, INT4_OPSET)
    return len(casts)


def find_token_table(graph: onnx.GraphProto) -> tuple[onnx.NodeProto, str] | None:
    """The Gather that looks token ids up, and its float table; None when the encoder has none."""
    index = GraphIndex(graph)
    for node in graph.node:
        if node.op_type == "Gather" and node.input[1] in index.inputs:
            table = index.initializers.get(node.input[0])
            if table is not None and len(table.dims) == 2 and table.data_type == TensorProto.FLOAT:
                return node, table.name
    return None


def store_token_table(model: onnx.ModelProto, gather: onnx.NodeProto, table: str, weight: QuantizedWeight) -> None:
    """Store the token table as integers with one scale per row, in place.

    Only the looked-up rows are dequantised: Gather(int8) -> Cast -> Mul(Gather(scale)). A DequantizeLinear of the
    whole table would run over all 49,408 rows for every query.

    Args:
        gather: the node that reads the table (of this model's graph).
        table: the float table's name, [vocabulary, width].
        weight: rows as channels.
    """
    graph = model.graph
    integers, scales = f"{table}_quantized", f"{table}_scale"
    rows, row_scale, real = f"{table}_rows", f"{table}_row_scale", f"{table}_rows_float"
    ids, result = gather.input[1], gather.output[0]
    set_initializer(graph, integers, weight.integers)
    set_initializer(graph, scales, weight.scale[:, None].astype(np.float32))
    nodes = [
        helper.make_node("Gather", [integers, ids], [rows], name=f"{table}_gather", axis=0),
        helper.make_node("Gather", [scales, ids], [row_scale], name=f"{table}_gather_scale", axis=0),
        helper.make_node("Cast", [rows], [real], name=f"{table}_cast_float", to=TensorProto.FLOAT),
        helper.make_node("Mul", [real, row_scale], [result], name=f"{table}_dequantize"),
    ]
    position = next(number for number, node in enumerate(graph.node) if node.name == gather.name)
    del graph.node[position]
    for offset, node in enumerate(nodes):
        graph.node.insert(position + offset, node)
    drop_unused(graph)
    if weight.num_bits == 4:
        store_int4(model, [integers])


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


def _prepend(graph: onnx.GraphProto, nodes: list[onnx.NodeProto]) -> None:
    existing = list(graph.node)
    del graph.node[:]
    graph.node.extend([*nodes, *existing])
