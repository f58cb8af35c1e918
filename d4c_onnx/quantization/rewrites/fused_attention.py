"""Attention as one operator: no copies for splitting and joining heads.

`com.microsoft.MultiHeadAttention` exists in onnxruntime only. It keeps scores in cache, needs none of the four
Transposes, and knows a causal mask without being given one; the answer is the same up to float32 rounding.
"""

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.attention import Attention, find_attentions, is_causal, mask_axes
from d4c_onnx.graph.values import CONTRIB, insert_before, node, set_constant, take_over, use_contrib
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite


def _fuse(model: ir.Model) -> Result:
    found, refused = find_attentions(model.graph)
    count = 0
    for attention in found:
        if attention.mask is not None and mask_axes(attention.mask) not in (2, 4):
            refused.append(Refusal(attention.softmax.name or "", "the axes of its mask are not known"))
            continue
        _fuse_one(model.graph, attention)
        count += 1
    if count:
        use_contrib(model)
    return Result(count, tuple(refused))


def _fuse_one(graph: ir.Graph, attention: Attention) -> None:
    name = f"{attention.softmax.name}_attention"
    inputs: list[ir.Value | None] = [attention.query, attention.key, attention.value]
    nodes = []
    mask, causal = attention.mask, is_causal(attention.mask) if attention.mask is not None else False
    if mask is not None and not causal:
        if mask_axes(mask) == 2:
            axes = set_constant(graph, "attention_mask_axes", np.array([0, 1], np.int64))
            # [length, length] -> [1, 1, length, length]
            nodes.append(node("Unsqueeze", [mask, axes], f"{name}_mask", name=f"{name}_mask_axes"))
            mask = nodes[0].outputs[0]
        inputs += [None, None, mask]
    attributes = {
        "num_heads": attention.heads,
        "scale": 1.0,  # the query carries 1 / sqrt(d) already
        "unidirectional": int(causal),
    }
    fused = node(f"{CONTRIB}:MultiHeadAttention", inputs, f"{name}_output", name=name, attributes=attributes)
    insert_before(graph, attention.join[1], [*nodes, fused])
    take_over(attention.output, fused.outputs[0])


FUSE_ATTENTION = Rewrite("attention as one operator of onnxruntime's", "float scores between products", _fuse)
