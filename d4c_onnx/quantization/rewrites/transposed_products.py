"""A transpose in front of a weight goes behind the product, in float16 graphs.

`Transpose(x) W = Transpose(x W)` where the channels stay last: the same rows times the same weight. CoCa's attentional
pool, which has its tokens before the batch, holds three such products, and onnxruntime (1.24 to 1.32, on x86 CPUs) dies
of them in float16 when it loads the file: fused with the Cast between them, Transpose and MatMul become a node without
a schema, at which its NCHWc transformer looks (microsoft/onnxruntime#28392).
"""

import onnx_ir as ir

from d4c_onnx.graph.values import attribute, dims, is_constant, is_op, maker, node, nodes_of, take_over
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _move(model: ir.Model) -> Result:
    """Let each product with a weight read what its transpose reads."""
    count, refused = 0, []
    for product in nodes_of(model.graph, "MatMul"):
        turn, weight = maker(product.inputs[0]), product.inputs[1]
        if turn is None or not is_op(turn, "Transpose") or not is_constant(weight) or len(dims(weight) or ()) != 2:
            continue
        order = attribute(turn, "perm")
        if not order or order[-1] != len(order) - 1:
            refused.append(Refusal(product.name or "", "the transpose moves the channels"))
            continue
        _move_one(model.graph, product, turn, order)
        count += 1
    return Result(count, tuple(refused))


def _move_one(graph: ir.Graph, product: ir.Node, turn: ir.Node, order: list[int]) -> None:
    rows = product.outputs[0]
    after = node("Transpose", turn.inputs, f"{rows.name}_turned", attributes={"perm": order})
    graph.insert_after(product, [after])
    take_over(rows, after.outputs[0])
    rows.shape = None  # it was that of the transposed rows
    product.replace_input_with(0, turn.inputs[0])
    after.replace_input_with(0, rows)


MOVE_TRANSPOSES = Rewrite("transposes behind products", "a float16 graph", _move)
