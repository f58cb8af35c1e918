"""Quantised products that read the same value (q, k and v of an attention) as one."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, replace_nodes, set_initializer
from d4c_onnx.graph.layers import INTEGER_PRODUCT
from d4c_onnx.quantization.deployment.attention import CONTRIB


@dataclass(frozen=True, slots=True)
class _Product:
    """One product: its node, its activation (integers, scale, zero point), its weight, scale and bias ("": none)."""

    node: onnx.NodeProto
    data: tuple[str, ...]
    weight: str
    scale: str
    bias: str


def fuse_qkv(model: onnx.ModelProto, narrow: Collection[str] = ()) -> dict[str, str]:
    """Join products of the same integers, in place: one product of all their columns, and a Split behind it.

    Exact: each column keeps its integers and its scale. Joined are QDQ products and `com.microsoft`'s
    MatMulIntegerToFloat (one of those makes the whole one) whose int8 weights have no zero points and no other reader.

    Args:
        model: a QDQ graph whose weights are stored as int8.
        narrow: the weights that fit in 4 bits; they are only joined with each other.

    Returns:
        For each weight that is gone the name of the one it is a part of.
    """
    graph = model.graph
    index = GraphIndex(graph)
    groups: dict[tuple[object, ...], list[_Product]] = defaultdict(list)
    for node in graph.node:
        product = _product(index, node)
        if product is not None:
            rows = index.initializers[product.weight].dims[0]
            groups[(*product.data, rows, product.weight in narrow)].append(product)
    fresh: dict[str, list[onnx.NodeProto]] = {}
    gone: dict[str, str] = {}
    for products in groups.values():
        if len(products) > 1:
            fresh |= {product.node.name: [] for product in products[1:]}
            fresh[products[0].node.name] = _join(graph, index, products)
            gone |= {product.weight: f"{products[0].node.name}_qkv_quantized" for product in products}
    if fresh:
        replace_nodes(graph, [new for node in graph.node for new in fresh.get(node.name, [node])])
        drop_unused(graph)
    return gone


def _product(index: GraphIndex, node: onnx.NodeProto) -> _Product | None:
    if node.op_type == INTEGER_PRODUCT:
        data, weight, scale, weight_scale, zero, weight_zero, bias = [*node.input, "", ""][:7]
        found = _Product(node, (data, scale, zero), weight, weight_scale, bias)
        return found if not weight_zero and _is_own_matrix(index, weight) else None
    if node.op_type != "MatMul":
        return None
    made = [index.producer.get(name) for name in node.input]
    if any(maker is None or maker.op_type != "DequantizeLinear" for maker in made):
        return None
    if len(index.consumers[node.input[1]]) != 1:
        return None
    activation, dequantize = (list(maker.input) for maker in made if maker is not None)
    if len(activation) != 3 or len(dequantize) != 2 or not _is_own_matrix(index, dequantize[0]):
        return None
    if attribute(index.producer[node.input[1]], "axis", 1) not in (1, -1):
        return None
    return _Product(node, tuple(activation), dequantize[0], dequantize[1], "")


def _is_own_matrix(index: GraphIndex, weight: str) -> bool:
    tensor = index.initializers.get(weight)
    matrix = tensor is not None and tensor.data_type == TensorProto.INT8 and len(tensor.dims) == 2
    return matrix and len(index.consumers[weight]) == 1


def _join(graph: onnx.GraphProto, index: GraphIndex, products: list[_Product]) -> list[onnx.NodeProto]:
    first = products[0]
    name = f"{first.node.name}_qkv"
    weight, scale, bias, sizes, made = (f"{name}_{part}" for part in ("quantized", "scale", "bias", "sizes", "columns"))
    widths = [int(index.initializers[product.weight].dims[1]) for product in products]

    def columns(names: list[str]) -> np.ndarray:
        """One float a column: a vector's own, a scalar's repeated, zeros for none."""
        parts = [index.constant(entry).reshape(-1) if entry else np.zeros(1) for entry in names]
        return np.concatenate([np.broadcast_to(part, width) for part, width in zip(parts, widths, strict=True)])

    set_initializer(graph, weight, np.concatenate([index.constant(product.weight) for product in products], 1))
    set_initializer(graph, scale, columns([product.scale for product in products]).astype(np.float32))
    set_initializer(graph, sizes, np.array(widths, np.int64))
    if any(product.node.op_type == INTEGER_PRODUCT for product in products):
        integers, data_scale, zero = first.data
        inputs = [integers, weight, data_scale, scale, zero]
        if any(product.bias for product in products):
            set_initializer(graph, bias, columns([product.bias for product in products]).astype(np.float32))
            inputs += ["", bias]
        nodes = [helper.make_node(INTEGER_PRODUCT, inputs, [made], name=name, domain=CONTRIB)]
    else:
        real = f"{name}_weight"
        nodes = [
            helper.make_node("DequantizeLinear", [weight, scale], [real], name=f"{weight}_dequantize", axis=1),
            helper.make_node("MatMul", [first.node.input[0], real], [made], name=name),
        ]
    outputs = [product.node.output[0] for product in products]
    return [*nodes, helper.make_node("Split", [made, sizes], outputs, name=f"{name}_split", axis=-1)]
