"""Residual sum, bias and LayerNorm as one kernel of onnxruntime, for float16 graphs.

`LayerNormalization(x + (y + bias))` becomes `com.microsoft.SkipLayerNormalization`; the sum is its second result, for
the next residual. The same up to rounding. On GPUs each step saved is a pass over the tokens and a kernel to launch; on
CPUs the operator is slower than its parts. It takes [batch, tokens, width] without broadcasting: shapes must be noted,
and a sum whose are not stays as it is.
"""

import onnx_ir as ir

from d4c_onnx.graph.layers import linear_source
from d4c_onnx.graph.values import (
    CONTRIB,
    attribute,
    dims,
    insert_before,
    is_constant,
    is_op,
    maker,
    node,
    nodes_of,
    only_reader,
    take_over,
    use_contrib,
)
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _fuse(model: ir.Model) -> Result:
    count, refused = 0, []
    fused: set[ir.Node] = set()
    for norm in nodes_of(model.graph, "LayerNormalization"):
        total = maker(norm.inputs[0])
        if total is None or total in fused or not is_op(total, "Add") or len(norm.inputs) < 3:
            continue
        if attribute(norm, "axis", -1) not in (-1, 2) or len(dims(norm.inputs[1]) or ()) != 1:
            continue
        reason = _fuse_one(model.graph, norm, total)
        if reason:
            refused.append(Refusal(norm.name or "", reason))
            continue
        fused.add(total)
        count += 1
    if count:
        use_contrib(model)
    return Result(count, tuple(refused))


def _fuse_one(graph: ir.Graph, norm: ir.Node, total: ir.Node) -> str:
    found = next((part for value in total.inputs if (part := _product(value)) is not None), None)
    if found is None:
        return "no summand is a product and its bias"
    summand, value, bias = found
    outer = next(entry for entry in total.inputs if entry is not summand)
    if outer is None or is_constant(outer) or not _same(summand, outer):
        return "the summands are not known to have one shape"
    skip = node(
        f"{CONTRIB}:SkipLayerNormalization",
        [value, outer, *norm.inputs[1:3], *([bias] if bias is not None else [])],
        [f"{norm.name}_normalised", None, None, f"{norm.name}_sum"],
        name=f"{norm.name}_skip",
        attributes={"epsilon": attribute(norm, "epsilon", 1e-5)},
    )
    insert_before(graph, total, [skip])
    take_over(norm.outputs[0], skip.outputs[0])
    take_over(total.outputs[0], skip.outputs[3])
    return ""


def _product(summand: ir.Value | None) -> tuple[ir.Value, ir.Value, ir.Value | None] | None:
    """Of a block's output, which has a row for each token: the summand, the product in it, and its bias or nothing."""
    source = linear_source(summand) if summand is not None and only_reader(summand) is not None else None
    if source is None or summand is None or source.node.op_type != "MatMul":
        return None
    return summand, source.node.outputs[0], source.bias


def _same(one: ir.Value, other: ir.Value) -> bool:
    """Whether two values are [batch, tokens, width] and neither is repeated along the other."""
    if one.shape is None or other.shape is None or len(one.shape) != 3 or len(other.shape) != 3:
        return False
    axes = list(zip(one.shape, other.shape, strict=True))
    sizes = [pair for pair in axes if all(isinstance(size, int) for size in pair)]
    return all(left == right for left, right in sizes) and not any(1 in pair for pair in axes if pair not in sizes)


FUSE_RESIDUALS = Rewrite("residual sums and LayerNorms as one operator", "a float16 graph with noted shapes", _fuse)
