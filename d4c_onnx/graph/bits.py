"""How many bits each weight really takes, counted from the written file."""

from dataclasses import dataclass
from math import prod

import onnx

from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.graph.layers import STORED_OPS

_BITS: dict[int, int] = {
    onnx.TensorProto.INT4: 4,
    onnx.TensorProto.UINT4: 4,
    onnx.TensorProto.INT8: 8,
    onnx.TensorProto.UINT8: 8,
    onnx.TensorProto.FLOAT16: 16,
    onnx.TensorProto.BFLOAT16: 16,
    onnx.TensorProto.FLOAT: 32,
}
# Two 4-bit values a byte are looked up here: the name marks a Gather that unpacks.
NIBBLE_TABLE = "nibble_pairs"
# What may stand between a stored weight and the node that multiplies with it; a Mul gives it its scale.
_PASS_THROUGH = {"DequantizeLinear", "QuantizeLinear", "Cast", "Mul", "Transpose", "Reshape", "Slice", "Identity"}


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


def layer_bits(model: onnx.ModelProto) -> list[LayerBits]:
    """Every MatMul (onnxruntime's integer one, too), Gemm and Conv with a stored weight, and how wide it is stored."""
    index = GraphIndex(model.graph)
    layers = []
    for node in model.graph.node:
        if node.op_type not in STORED_OPS:
            continue
        for name in (node.input[1], node.input[0]) if node.op_type == "MatMul" else (node.input[1],):
            stored = _stored(index, name)
            if stored is not None:
                tensor, shape, bits = stored
                layers.append(LayerBits(node.name, node.op_type, tensor.name, shape, bits))
                break
    return layers


def average_bits(layers: list[LayerBits]) -> float:
    """Stored bits per weight, over all weights of all given layers."""
    total = sum(layer.elements for layer in layers)
    return sum(layer.elements * layer.bits for layer in layers) / total if total else 0.0


def _stored(index: GraphIndex, name: str) -> tuple[onnx.TensorProto, tuple[int, ...], int] | None:
    """The initialiser behind a value, the shape it has there, and its bits a value."""
    reshaped: tuple[int, ...] | None = None  # the shape that nibbles are unpacked to
    nibbles = False
    while name not in index.initializers:
        node = index.producer.get(name)
        if node is not None and node.op_type == "Gather" and node.input[0] == NIBBLE_TABLE:
            nibbles, name = True, node.input[1]
            continue
        if node is None or node.op_type not in _PASS_THROUGH:
            return None
        if node.op_type == "Mul" and node.input[1] not in index.initializers:
            return None
        if node.op_type == "Reshape" and reshaped is None and node.input[1] in index.initializers:
            reshaped = tuple(int(size) for size in index.constant(node.input[1]))
        name = node.input[0]
    tensor = index.initializers[name]
    shape = reshaped if nibbles and reshaped else tuple(tensor.dims)
    return (tensor, shape, 4 if nibbles else _BITS.get(tensor.data_type, 32)) if len(shape) >= 2 else None
