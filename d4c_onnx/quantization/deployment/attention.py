"""Attention as one operator: no copies for splitting and joining heads."""

import numpy as np
import onnx
from onnx import helper

from d4c_onnx.graph.files import raise_opset
from d4c_onnx.graph.index import GraphIndex, drop_unused, replace_nodes, set_initializer
from d4c_onnx.quantization.deployment.pattern import Heads, find_attention, mask_axes

CONTRIB = "com.microsoft"
STANDARD_OPSET = 23  # the first that knows Attention
_HIDDEN = -1e4  # what is added to a hidden score: its exponential is 0


def fuse_attention(model: onnx.ModelProto, *, standard: bool = False) -> int:
    """Replace float attention by one operator each, in place; returns how many.

    `com.microsoft.MultiHeadAttention` exists in onnxruntime only. The standard Attention (`standard`) is of opset 23,
    to which the model is raised; onnxruntime runs such files since 1.24. Both keep scores in cache, need none of the
    four Transposes, and know a causal mask without being given one; the answer is the same up to float32 rounding. What
    has another form stays as it is.

    Raises:
        GraphError: the opset cannot be raised.
    """
    graph = model.graph
    index = GraphIndex(graph)
    found = [
        heads
        for node in graph.node
        if node.op_type == "Softmax"
        and (heads := find_attention(index, node))
        and (heads.mask is None or mask_axes(index, heads.mask) in (2, 4))
    ]
    if not found:
        return 0
    form = _standard if standard else _fused
    replaced = {heads.join[1].name: form(graph, index, heads) for heads in found}
    replace_nodes(graph, [new for node in graph.node for new in replaced.get(node.name, [node])])
    drop_unused(graph)
    if standard:
        raise_opset(model, STANDARD_OPSET)
    else:
        use_contrib(model)
    return len(found)


def use_contrib(model: onnx.ModelProto) -> None:
    """Declare onnxruntime's own operators, in place."""
    if all(entry.domain != CONTRIB for entry in model.opset_import):
        model.opset_import.append(helper.make_opsetid(CONTRIB, 1))


def _fused(graph: onnx.GraphProto, index: GraphIndex, heads: Heads) -> list[onnx.NodeProto]:
    name = f"{heads.softmax.name}_attention"
    inputs = [heads.query, heads.key, heads.value]
    nodes = []
    causal = heads.mask is not None and _is_causal(index, heads.mask)
    if heads.mask is not None and not causal:
        mask = heads.mask
        if mask_axes(index, mask) == 2:
            axes = "attention_mask_axes"
            set_initializer(graph, axes, np.array([0, 1], np.int64))
            mask = f"{name}_mask"  # [length, length] -> [1, 1, length, length]
            nodes.append(helper.make_node("Unsqueeze", [heads.mask, axes], [mask], name=f"{mask}_axes"))
        inputs += ["", "", mask]
    nodes.append(
        helper.make_node(
            "MultiHeadAttention",
            inputs,
            [heads.join[1].output[0]],
            name=name,
            domain=CONTRIB,
            num_heads=heads.heads,
            scale=1.0,  # the query carries 1 / sqrt(d) already
            unidirectional=int(causal),
        )
    )
    return nodes


def _standard(_: onnx.GraphProto, index: GraphIndex, heads: Heads) -> list[onnx.NodeProto]:
    causal = heads.mask is not None and _is_causal(index, heads.mask)
    mask = [heads.mask] if heads.mask is not None and not causal else []  # of any rank: it is broadcast
    node = helper.make_node(
        "Attention",
        [heads.query, heads.key, heads.value, *mask],
        [heads.join[1].output[0]],
        name=f"{heads.softmax.name}_attention",
        q_num_heads=heads.heads,
        kv_num_heads=heads.heads,
        scale=1.0,  # the query carries 1 / sqrt(d) already
        is_causal=int(causal),
    )
    return [node]


def _is_causal(index: GraphIndex, mask: str) -> bool:
    """Whether a mask [length, length] is the top left corner of a constant that hides exactly what comes later."""
    while (maker := index.producer.get(mask)) is not None:
        starts = index.array(maker.input[1]) if maker.op_type == "Slice" else None
        steps = index.array(maker.input[4]) if maker.op_type == "Slice" and len(maker.input) > 4 else None
        if starts is None or starts.any() or (steps is not None and (steps != 1).any()):
            return False
        mask = maker.input[0]
    whole = index.array(mask)
    if whole is None or whole.ndim != 2 or whole.shape[0] != whole.shape[1]:
        return False
    later = np.triu(np.ones(whole.shape, bool), 1)
    return bool((whole[later] <= _HIDDEN).all() and not whole[~later].any())
