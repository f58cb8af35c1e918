"""What is in an encoder file, layer by layer, and what onnxruntime makes of it when it loads."""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import numpy as np
import onnx
import onnxruntime as ort

from d4c_onnx.graph.bits import LayerBits, average_bits, layer_bits
from d4c_onnx.graph.files import load_graph
from d4c_onnx.graph.index import GraphIndex, attribute
from d4c_onnx.graph.layers import INTEGER_PRODUCT, STORED_OPS
from d4c_onnx.graph.signature import signature
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
        bits: per stored weight; None without one.
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
    bits: int | None
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

    def as_dict(self) -> dict[str, Any]:
        """For --json."""
        return {
            "layers": [asdict(layer) for layer in self.layers],
            "weight_bits_average": self.weight_bits_average,
            "summary": self.summary,
            "io": asdict(self.io),
        }


def inspect_encoder(path: Path, entries: Mapping[str, str] | None = None) -> Inspection:
    """Read a file and the graph that onnxruntime's CPU provider makes of it.

    Args:
        entries: session config entries that the file is served with.

    Raises:
        BundleError: onnxruntime cannot load the file.
    """
    model = load_graph(path)
    index = GraphIndex(model.graph)
    running = _Running(optimized_graph(path, entries).graph)
    weights = {layer.node: layer for layer in layer_bits(model)}
    layers = []
    for node in model.graph.node:
        if node.op_type not in STORED_OPS:
            continue
        stored = weights.get(node.name)
        unpacked = stored.weight.removesuffix("_int4").removesuffix("_nibbles") if stored else None
        kernel = running.kernel(index, node, unpacked)
        data, weight = _quantizers(index, node, stored is not None)
        shape = stored.shape if stored else ()
        int8 = kernel in INT8_KERNELS
        layers.append(
            InspectedLayer(
                node.name,
                node.op_type,
                shape,
                stored.bits if stored else None,
                _dtype(index, node, stored is not None, data),
                _range(index, data),
                _scales(index, weight or (_unpacked(index, node) if stored else None)) if stored else None,
                kernel,
                int8,
                "" if int8 else _reason(data, stored, kernel),
            )
        )
    weighted = [layer for layer in layers if layer.shape]
    others = [layer for layer in layers if not layer.shape]
    summary = f"{sum(layer.int8 for layer in weighted)} of {len(weighted)} weighted products in int8"
    if others:
        summary += f", {sum(layer.int8 for layer in others)} of {len(others)} attention products"
    fused = sum(node.op_type in ("MultiHeadAttention", "Attention") for node in model.graph.node)
    if fused:
        summary += f", {fused} attentions in one float kernel each"
    return Inspection(tuple(layers), tuple(weights.values()), signature(model), summary)


class _Running:
    """The products of an optimised graph, found again by what a fusion leaves of the original."""

    def __init__(self, graph: onnx.GraphProto) -> None:
        products = [node for node in graph.node if node.op_type in (*INT8_KERNELS, *FLOAT_KERNELS)]
        self._by_output = {name: node.op_type for node in products for name in node.output}
        self._by_input = {name: node.op_type for node in products for name in node.input if name}
        # channels-last and blocked convolutions and scaled products keep the node's or its output's name with a mark
        # behind it
        self._by_name = {
            node.name.split("_token_")[0]
            .split("/MatMulScale")[0]
            .removeprefix("InsertedPrecisionFreeCast_")
            .removesuffix("_nchwc"): node.op_type
            for node in products
        }

    def kernel(self, index: GraphIndex, node: onnx.NodeProto, weight: str | None) -> str:
        """By the weight it reads, its name, or the value it makes (or the first one behind that survived)."""
        for found in (self._by_input.get(weight) if weight else None, self._by_name.get(node.name)):
            if found is not None:
                return str(found)
        queue = [node.output[0]]
        for name in queue:
            found = self._by_output.get(name) or self._by_name.get(name)
            if found is not None:
                return str(found)
            for reader in index.consumers.get(name, []):
                if reader.op_type in _FUSED and len(queue) < 16:
                    queue.extend(reader.output)
        return "unknown"


def _quantizers(
    index: GraphIndex, node: onnx.NodeProto, weighted: bool
) -> tuple[onnx.NodeProto | None, onnx.NodeProto | None]:
    """The DequantizeLinear in front of the activation and of the weight; None where there is none.

    An integer product holds what they would: they are made up of it.
    """
    if node.op_type == INTEGER_PRODUCT:
        integers, weight, scale, weight_scale, *zero = node.input[:5]
        data = onnx.helper.make_node("DequantizeLinear", [integers, scale, *zero], [])
        return data, onnx.helper.make_node("DequantizeLinear", [weight, weight_scale], [])
    found: list[onnx.NodeProto | None] = []
    for name in node.input[:2]:
        maker = index.producer.get(name)
        while maker is not None and maker.op_type in ("Transpose", "Reshape", "Identity"):
            maker = index.producer.get(maker.input[0])
        found.append(maker if maker is not None and maker.op_type == "DequantizeLinear" else None)
    if weighted and node.op_type == "MatMul" and found[0] is not None and _is_stored(index, found[0]):
        found.reverse()
    return found[0], found[1]


def _is_stored(index: GraphIndex, dequantize: onnx.NodeProto) -> bool:
    maker = index.producer.get(dequantize.input[0])
    return maker is None or maker.op_type in ("Cast", "Reshape")


def _unpacked(index: GraphIndex, node: onnx.NodeProto) -> onnx.NodeProto | None:
    """The Mul that gives a weight its scale, where the weight is unpacked when the file is loaded."""
    for name in node.input[:2]:
        maker = index.producer.get(name)
        while maker is not None and maker.op_type == "Cast":
            maker = index.producer.get(maker.input[0])
        if maker is not None and maker.op_type == "Mul" and maker.input[1] in index.initializers:
            first = index.producer.get(maker.input[0])
            if first is not None and first.op_type == "Cast" and first.input[0] in index.initializers:
                return maker
    return None


def _dtype(index: GraphIndex, node: onnx.NodeProto, weighted: bool, dequantize: onnx.NodeProto | None) -> str:
    if dequantize is None:
        halves = [tensor for tensor in index.initializers.values() if tensor.data_type == onnx.TensorProto.FLOAT16]
        own = any(_is_half(index, name) for name in node.input[:2])
        return "float16" if own or (halves and not weighted) else "float32"
    zero = index.array(dequantize.input[2]) if len(dequantize.input) > 2 else None
    return "uint8" if zero is None else str(zero.dtype)


def _is_half(index: GraphIndex, name: str) -> bool:
    tensor, maker = index.initializers.get(name), index.producer.get(name)
    if tensor is not None:
        return tensor.data_type == onnx.TensorProto.FLOAT16
    return maker is not None and maker.op_type == "Cast" and attribute(maker, "to") == onnx.TensorProto.FLOAT16


def _range(index: GraphIndex, dequantize: onnx.NodeProto | None) -> tuple[float, float] | None:
    if dequantize is None:
        return None
    scale = index.array(dequantize.input[1])
    zero = index.array(dequantize.input[2]) if len(dequantize.input) > 2 else np.uint8(0)
    if scale is None or zero is None or scale.size != 1:
        return None
    limits = np.iinfo(zero.dtype)
    ends = [(limit - int(zero)) * float(scale) for limit in (limits.min, limits.max)]
    return ends[0], ends[1]


def _scales(index: GraphIndex, dequantize: onnx.NodeProto | None) -> tuple[float, float] | None:
    scale = None if dequantize is None else index.array(dequantize.input[1])
    return None if scale is None else (float(scale.min()), float(scale.max()))


def _reason(data: onnx.NodeProto | None, stored: LayerBits | None, kernel: str) -> str:
    if data is None and stored is not None and stored.bits < 16:
        return "weights only: unpacked when the file is loaded, multiplied in float"
    if data is None:
        return "in float in the file"
    return f"quantised in the file, but onnxruntime {ort.__version__} runs {kernel} between (de)quantisers"
