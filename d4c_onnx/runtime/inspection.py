"""What is in an encoder file, layer by layer, and what onnxruntime makes of it when it loads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
import onnx_ir as ir
import onnxruntime as ort

from d4c_onnx.graph.model import load_model, signature_of
from d4c_onnx.graph.stored import (
    INTEGER_PRODUCT,
    STORED_OPS,
    LayerBits,
    StoredWeight,
    average_bits,
    layer_bits,
    stored_weight,
)
from d4c_onnx.graph.values import array, is_op, maker, name_of, nodes_of, readers, walk_back
from d4c_onnx.manifest import Signature
from d4c_onnx.runtime.kernels import FLOAT_KERNELS, INT8_KERNELS
from d4c_onnx.runtime.session import optimized_graph

# What onnxruntime may fuse into a product's kernel: the kernel then makes a value further down.
_FUSED = ("Add", "Relu", "Clip", "QuantizeLinear", "DequantizeLinear", "Gelu", "Mul", "Reshape", "Transpose")


@dataclass(frozen=True, slots=True)
class InspectedLayer:
    """One matrix product of a file.

    Attributes:
        node, op: as in the file.
        shape: of the stored weight; empty for the product of two activations.
        bits: per stored weight, its share of a multiplier included; None without one.
        activation: uint8, int8, float16 or float32: what is multiplied.
        activation_range: the real values at the ends of the activation's grid; None in float.
        weight_scales: least and largest scale of the weight's channels; None where it is stored in float.
        kernel: what onnxruntime's CPU provider runs, read from its optimised graph.
        int8: whether that is an int8 kernel.
        reason: why not, when it is not.
    """

    node: str
    op: str
    shape: tuple[int, ...]
    bits: float | None
    activation: str
    activation_range: tuple[float, float] | None
    weight_scales: tuple[float, float] | None
    kernel: str
    int8: bool
    reason: str


@dataclass(frozen=True, slots=True)
class Inspection:
    """One encoder file: its products, its stored weights, inputs and outputs, and a one-line summary."""

    layers: tuple[InspectedLayer, ...]
    stored: tuple[LayerBits, ...]
    io: Signature
    summary: str

    @property
    def weight_bits_average(self) -> float:
        """Stored bits a weight."""
        return round(average_bits(list(self.stored)), 4)

    def as_dict(self) -> dict[str, object]:
        """For --json."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "weight_bits_average": self.weight_bits_average,
            "summary": self.summary,
            "io": asdict(self.io),
        }


def inspect_encoder(path: Path, entries: Mapping[str, str] | None = None, model: ir.Model | None = None) -> Inspection:
    """Read a file and the graph that onnxruntime's CPU provider makes of it.

    Args:
        entries: session config entries that the file is served with.
        model: the file's, where it is in memory already.

    Raises:
        BundleError: onnxruntime cannot load the file.
    """
    model = load_model(path) if model is None else model
    running = _Running(optimized_graph(path, entries).graph)
    layers = [_inspect(product, running) for product in nodes_of(model.graph, *STORED_OPS)]
    return Inspection(tuple(layers), tuple(layer_bits(model)), signature_of(model), _summary(model.graph, layers))


def _inspect(product: ir.Node, running: "_Running") -> InspectedLayer:
    stored = stored_weight(product)
    kernel = running.kernel(product, stored)
    data = _quantizer(product, stored)
    int8 = kernel in INT8_KERNELS
    return InspectedLayer(
        product.name or "",
        product.op_type,
        stored.shape if stored else (),
        stored.num_bits if stored else None,
        _dtype(product, stored, data),
        _range(data),
        _ends(array(stored.scale)) if stored else None,
        kernel,
        int8,
        "" if int8 else _reason(data, stored, kernel),
    )


def _summary(graph: ir.Graph, layers: list[InspectedLayer]) -> str:
    weighted, others = [layer for layer in layers if layer.shape], [layer for layer in layers if not layer.shape]
    summary = f"{sum(layer.int8 for layer in weighted)} of {len(weighted)} weighted products in int8"
    if others:
        summary += f", {sum(layer.int8 for layer in others)} of {len(others)} attention products"
    fused = sum(node.op_type in ("MultiHeadAttention", "Attention") for node in graph)
    return f"{summary}, {fused} attentions in one float kernel each" if fused else summary


class _Running:
    """The products of an optimised graph, found again by what a fusion leaves of the original."""

    def __init__(self, graph: ir.Graph) -> None:
        products = [node for node in graph if node.op_type in (*INT8_KERNELS, *FLOAT_KERNELS)]
        self._by_output = {name_of(value): node.op_type for node in products for value in node.outputs}
        self._by_input = {name_of(value): node.op_type for node in products for value in node.inputs if value}
        # channels-last and blocked convolutions and scaled products keep the node's or its output's name with a mark
        # behind it
        self._by_name = {
            str(node.name)
            .split("_token_")[0]
            .split("/MatMulScale")[0]
            .removeprefix("InsertedPrecisionFreeCast_")
            .removesuffix("_nchwc"): node.op_type
            for node in products
        }

    def kernel(self, product: ir.Node, stored: StoredWeight | None) -> str:
        """By its name, the weight it reads, or the value it makes (or the first one behind that survived)."""
        weight = stored.integers or stored.initializer if stored is not None else None
        named = self._by_name.get(product.name) if product.name else None  # first: another may read the same weight
        for found in (named, self._by_input.get(name_of(weight)) if weight else None):
            if found is not None:
                return found
        queue = [product.outputs[0]]
        for value in queue:
            found = self._by_output.get(name_of(value)) or self._by_name.get(name_of(value))
            if found is not None:
                return found
            for reader in readers(value):
                if is_op(reader, *_FUSED) and len(queue) < 16:
                    queue.extend(reader.outputs)
        return "unknown"


@dataclass(frozen=True, slots=True)
class _Quantizer:
    """Scale and zero point that an activation is dequantised by."""

    scale: ir.Value | None
    zero_point: ir.Value | None


def _quantizer(product: ir.Node, stored: StoredWeight | None) -> _Quantizer | None:
    """Of the activation; None where it is multiplied in float. An integer product holds them itself."""
    if is_op(product, INTEGER_PRODUCT):
        return _Quantizer(product.inputs[2], product.inputs[4] if len(product.inputs) > 4 else None)
    for value in product.inputs[:2]:
        made = maker(walk_back(value, "Transpose", "Reshape", "Identity"))
        if is_op(made, "DequantizeLinear") and made is not None and (stored is None or made is not stored.dequantize):
            return _Quantizer(made.inputs[1], made.inputs[2] if len(made.inputs) > 2 else None)
    return None


def _dtype(product: ir.Node, stored: StoredWeight | None, data: _Quantizer | None) -> str:
    if data is None:
        graph = product.graph
        halves = graph is not None and any(value.dtype == ir.DataType.FLOAT16 for value in graph.initializers.values())
        own = any(_is_half(value) for value in product.inputs[:2])
        return "float16" if own or (halves and stored is None) else "float32"
    zero = array(data.zero_point)
    return "uint8" if zero is None else str(zero.dtype)


def _is_half(value: ir.Value | None) -> bool:
    made = maker(value)
    if made is None:
        return value is not None and value.dtype == ir.DataType.FLOAT16
    return is_op(made, "Cast") and made.attributes["to"].value == ir.DataType.FLOAT16


def _range(data: _Quantizer | None) -> tuple[float, float] | None:
    if data is None:
        return None
    scale, zero = array(data.scale), np.uint8(0) if data.zero_point is None else array(data.zero_point)
    if scale is None or zero is None or scale.size != 1:
        return None
    limits = np.iinfo(zero.dtype)
    ends = [(limit - int(zero)) * float(scale) for limit in (limits.min, limits.max)]
    return ends[0], ends[1]


def _ends(scale: np.ndarray | None) -> tuple[float, float] | None:
    return None if scale is None else (float(scale.min()), float(scale.max()))


def _reason(data: _Quantizer | None, stored: StoredWeight | None, kernel: str) -> str:
    if data is None and stored is not None and stored.num_bits < 16:
        return "weights only: unpacked when the file is loaded, multiplied in float"
    if data is None:
        return "in float in the file"
    return f"quantised in the file, but onnxruntime {ort.__version__} runs {kernel} between (de)quantisers"
