"""What only products of the pooled row read is the sum of two integer terms, each with an integer product of its own.

A CLIP tower reads one token of its last block, and nothing averages what rounding does to that one row: the inputs of
its products make a quarter of what all activations cost a really trained ViT-S/14, and take next to no time. So

    W x ~ W x1 + W x2,      x1 = s1 (q1 - z1),      x2 = s2 (q2 - 128) ~ x - x1,      s2 = s1 / 255,

where q1 and q2 are uint8: sixteen bits, for |x - x1| <= s1 / 2 wherever x1 does not clip. Both products read the same
stored weight and are integer kernels. It is better than x1 alone, and not the same.
"""

from collections.abc import Mapping

import numpy as np
import onnx_ir as ir

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.layers import add_beside, with_bias
from d4c_onnx.graph.values import (
    is_op,
    maker,
    name_of,
    node,
    nodes_by_name,
    nodes_of,
    readers,
    set_scalar,
)
from d4c_onnx.manifest import Refusal, RewriteRecord
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rewrites.pooled_row import products_of_pooled_row
from d4c_onnx.quantization.rewrites.rewrite import Result

NAME = "activations in two integer terms"


def read_by_pooled_row(model: ir.Model, plan: Plan) -> frozenset[str]:
    """Of a float encoder's quantised activations those that only products of the pooled row read in integers."""
    alone = products_of_pooled_row(model)
    nodes = nodes_by_name(model.graph)
    read: dict[str, bool] = {}
    for entry in (nodes[name] for name in plan.nodes):
        for value in entry.inputs:
            if value is not None and name_of(value) in plan.activations:
                read[name_of(value)] = read.get(name_of(value), True) and entry.name in alone
    return frozenset(name for name, fits in read.items() if fits)


def add_second_terms(model: ir.Model, ranges: Mapping[str, QuantParams]) -> tuple[RewriteRecord, ...]:
    """Give activations whose grids have two terms the second one, in place, in a QDQ graph that holds the first."""
    count, refused = 0, []
    for pair in list(nodes_of(model.graph, "DequantizeLinear")):
        quantize = maker(pair.inputs[0])
        value = quantize.inputs[0] if quantize is not None and is_op(quantize, "QuantizeLinear") else None
        params = ranges.get(name_of(value)) if value is not None else None
        if value is None or params is None or not params.two_terms:
            continue
        products = readers(pair.outputs[0])
        strange = next((entry for entry in products if not _splits(entry, pair)), None)
        if strange is not None:
            refused.append(Refusal(name_of(value), f"{strange.name} ({strange.op_type}), which reads it, is no x W"))
            continue
        _add(model.graph, value, pair, params.remainder, products)
        count += 1
    return (Result(count, tuple(refused)).record(NAME),)


def _splits(product: ir.Node, pair: ir.Node) -> bool:
    """x W, whose sum is no output of the graph: that would have to keep its name."""
    plain = is_op(product, "MatMul") and product.inputs[0] is pair.outputs[0]
    return plain and not with_bias(product).is_graph_output()


def _add(graph: ir.Graph, value: ir.Value, pair: ir.Node, grid: QuantParams, products: list[ir.Node]) -> None:
    name = f"{name_of(value)}_second"
    scale = set_scalar(graph, f"{name}_scale", grid.scale, np.float32)
    zero = set_scalar(graph, f"{name}_zero_point", grid.zero_point, np.uint8)
    left = node("Sub", [value, pair.outputs[0]], f"{name}_left", name=f"{name}_left")
    quantize = node("QuantizeLinear", [left.outputs[0], scale, zero], f"{name}_integer", name=f"{name}_quantize")
    term = node("DequantizeLinear", [quantize.outputs[0], scale, zero], name, name=f"{name}_dequantize")
    graph.insert_after(pair, [left, quantize, term])
    for product in products:
        own = f"{product.name}_second"
        beside = node("MatMul", [term.outputs[0], product.inputs[1]], f"{own}_product", name=own)
        add_beside(graph, product, beside, f"{own}_whole", f"{own}_add")
