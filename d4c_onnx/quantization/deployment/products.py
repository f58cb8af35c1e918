"""Quantised products: finding them, and making one of those that read the same value (q, k and v of an attention)."""

from collections import defaultdict
from collections.abc import Collection
from dataclasses import dataclass

import numpy as np
import onnx
from onnx import TensorProto, helper

from d4c_onnx.graph.index import GraphIndex, attribute, drop_unused, integer_attribute, replace_nodes, set_initializer
from d4c_onnx.graph.layers import INTEGER_PRODUCT
from d4c_onnx.quantization.deployment.attention import CONTRIB


@dataclass(frozen=True, slots=True)
class Product:
    """One quantised product with a constant matrix.

    Attributes:
        node: a QDQ MatMul, or `com.microsoft.MatMulIntegerToFloat`.
        data: of the activation the integers, the one scale and the one zero point.
        weight: the int8 matrix, an initialiser or unpacked from one of int4; its zero points are 0.
        scale: of the matrix, one or one a column.
        bias: inside the node; empty without one.
        shape: of the matrix.
    """

    node: onnx.NodeProto
    data: tuple[str, ...]
    weight: str
    scale: str
    bias: str
    shape: tuple[int, int]


def find_product(index: GraphIndex, node: onnx.NodeProto) -> Product | None:
    """The quantised product that `node` is; None where it is something else."""
    if node.op_type == INTEGER_PRODUCT:
        integers, weight, data_scale, scale, zero, weight_zero, bias = [*node.input, "", ""][:7]
        data, axis, zeros = (integers, data_scale, zero), 1, [weight_zero] if weight_zero else []
    elif node.op_type == "MatMul":
        made = [index.producer.get(name) for name in node.input]
        if any(maker is None or maker.op_type != "DequantizeLinear" for maker in made):
            return None
        activation, matrix = (maker for maker in made if maker is not None)
        data, bias = tuple(activation.input), ""
        (weight, scale, *zeros), axis = matrix.input, integer_attribute(matrix, "axis", 1)
    else:
        return None
    shape = _int8_matrix(index, weight)
    values = index.array(scale)
    per_column = values is not None and shape is not None and axis in (1, -1) and values.shape == shape[1:]
    exact = all((zero := index.array(name)) is not None and not zero.any() for name in zeros)
    if shape is None or values is None or not exact or not (per_column or values.size == 1):
        return None
    single = len(data) == 3 and all((one := index.array(name)) is not None and one.size == 1 for name in data[1:])
    return Product(node, data, weight, scale, bias, shape) if single and data[0] not in index.initializers else None


def _int8_matrix(index: GraphIndex, name: str) -> tuple[int, int] | None:
    """The shape of a constant int8 matrix, stored as such or as int4 behind a Cast."""
    maker = index.producer.get(name)
    unpacked = maker is not None and maker.op_type == "Cast" and attribute(maker, "to") == TensorProto.INT8
    tensor = index.initializers.get(maker.input[0] if maker is not None and unpacked else name)
    if tensor is None or len(tensor.dims) != 2 or not (unpacked or tensor.data_type == TensorProto.INT8):
        return None
    return tensor.dims[0], tensor.dims[1]


def fuse_qkv(model: onnx.ModelProto, narrow: Collection[str] = ()) -> dict[str, str]:
    """Join products of the same integers, in place: one product of all their columns, and a Split behind it.

    Exact: each column keeps its integers and its scale. One `com.microsoft.MatMulIntegerToFloat` among them makes the
    whole one. What something else reads, too, is left alone.

    Args:
        model: a quantised graph whose weights are stored as int8.
        narrow: the weights that fit in 4 bits; they are only joined with each other.

    Returns:
        For each weight that is gone the name of the one it is a part of.
    """
    graph = model.graph
    index = GraphIndex(graph)
    groups: dict[tuple[object, ...], list[Product]] = defaultdict(list)
    for node in graph.node:
        product = find_product(index, node)
        if product is None or product.weight not in index.initializers:
            continue
        if all(len(index.consumers[name]) == 1 for name in (node.input[1], product.weight)):
            groups[(*product.data, product.shape[0], product.weight in narrow)].append(product)
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


def _join(graph: onnx.GraphProto, index: GraphIndex, products: list[Product]) -> list[onnx.NodeProto]:
    first = products[0]
    name = f"{first.node.name}_qkv"
    weight, scale, bias, sizes, made = (f"{name}_{part}" for part in ("quantized", "scale", "bias", "sizes", "columns"))
    widths = [product.shape[1] for product in products]

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
