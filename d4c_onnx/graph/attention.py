"""Multi-head attention in a graph: a Softmax, the two products around it, and how heads are split and joined.

The one finder of attention: rewrites, smoothing, the start token and inspection ask it.
"""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.graph.values import array, integers, is_op, maker, name_of, nodes_of, only_reader
from d4c_onnx.manifest import Refusal

_HIDDEN = -1e4  # what is added to a hidden score: its exponential is 0
_SPLIT, _TURNED = [0, 2, 1, 3], [0, 2, 3, 1]  # to [batch, heads, length, depth], and keys to [.., depth, length]


@dataclass(frozen=True, slots=True)
class Attention:
    """One attention as the export writes it.

    Attributes:
        query, key, value: float [batch, length, width], before they are split into heads.
        mask: what is added to the scores; None without one.
        softmax: the node.
        scores, mixed: the products before and behind it.
        split: the Reshape and Transpose of the query.
        value_split: those of the value.
        join: the Transpose and Reshape that put the heads together again.
        heads: how many.
        width: of all heads together.
    """

    query: ir.Value
    key: ir.Value
    value: ir.Value
    mask: ir.Value | None
    softmax: ir.Node
    scores: ir.Node
    mixed: ir.Node
    split: tuple[ir.Node, ir.Node]
    value_split: tuple[ir.Node, ir.Node]
    join: tuple[ir.Node, ir.Node]
    heads: int
    width: int

    @property
    def output(self) -> ir.Value:
        """float [batch, length, width], heads side by side."""
        return self.join[1].outputs[0]


def find_attentions(graph: ir.Graph) -> tuple[list[Attention], list[Refusal]]:
    """Every attention in graph order, and each Softmax that is none, with the reason."""
    found: list[Attention] = []
    refused: list[Refusal] = []
    for softmax in nodes_of(graph, "Softmax"):
        seen = attention_of(softmax)
        if isinstance(seen, Attention):
            found.append(seen)
        else:
            refused.append(seen)
    return found, refused


def values_mixed(graph: ir.Graph) -> dict[str, str]:
    """Of every attention, its output's name and that of the values [batch, length, width] whose averages it holds.

    Whatever the scores, the output lies between the least and the largest value of its channel; a head that looks at
    one token alone passes that token's value through.
    """
    return {name_of(found.output): name_of(found.value) for found in find_attentions(graph)[0]}


def attention_of(softmax: ir.Node) -> Attention | Refusal:
    """The attention around a Softmax, or why it has another form."""

    def no(reason: str) -> Refusal:
        return Refusal(softmax.name or "", reason)

    before, mask = maker(softmax.inputs[0]), None
    if before is not None and is_op(before, "Add"):
        first = 0 if is_op(maker(before.inputs[0]), "MatMul") else 1
        mask, before = before.inputs[1 - first], maker(before.inputs[first])
    mixed = only_reader(softmax.outputs[0])
    if before is None or not is_op(before, "MatMul"):
        return no("what the softmax reads is no product of queries and keys, with or without a mask added")
    if mixed is None or not is_op(mixed, "MatMul"):
        return no("the softmax is not read by one product with values alone")
    query, key, value = (_split(entry) for entry in (before.inputs[0], before.inputs[1], mixed.inputs[1]))
    if query is None or key is None or value is None:
        return no("queries, keys or values are not split into heads by a Reshape and a Transpose")
    if [integers(turn, "perm", 4, -1) for _, turn in (query, key, value)] != [_SPLIT, _TURNED, _SPLIT]:
        return no("heads are split in another order of axes")
    turned = only_reader(mixed.outputs[0])
    joined = only_reader(turned.outputs[0]) if turned is not None else None
    if turned is None or joined is None or not is_op(turned, "Transpose") or not is_op(joined, "Reshape"):
        return no("heads are not joined by a Transpose and a Reshape")
    if integers(turned, "perm", 4, -1) != _SPLIT:
        return no("heads are joined in another order of axes")
    shapes = {tuple(_last_sizes(shaped.inputs[1], 2) or ()) for shaped, _ in (query, key, value)}
    width = _last_sizes(joined.inputs[1], 1)
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or width is None or shape[0] * shape[1] != width[0]:
        return no("the number of heads, or their width, is not a constant, or not the same for all three")
    before_split = [shaped.inputs[0] for shaped, _ in (query, key, value)]
    whole = [entry for entry in before_split if entry is not None]
    if len(whole) != 3:
        return no("a Reshape reads nothing")
    return Attention(
        whole[0],
        whole[1],
        whole[2],
        mask,
        softmax,
        before,
        mixed,
        query,
        value,
        (turned, joined),
        shape[0],
        width[0],
    )


def mask_axes(mask: ir.Value) -> int | None:
    """The axes of a mask: 2, [query, key]; 4, [batch or 1, heads or 1, query, key]; None where they are unknown."""
    made = maker(mask)
    if made is None:
        whole = array(mask)
        return None if whole is None else whole.ndim
    inner = made.inputs[0]
    if is_op(made, "Slice") and inner is not None:
        return mask_axes(inner)
    if is_op(made, "Reshape"):
        shape = array(made.inputs[1])
        return None if shape is None else len(shape)
    if is_op(made, "Gather") and inner is not None:  # of some rows
        rows = array(made.inputs[1])
        return mask_axes(inner) if rows is not None and rows.ndim == 1 else None
    return 4 if is_op(made, "Unsqueeze") else None  # the pooled row's, one for each text


def is_causal(mask: ir.Value | None) -> bool:
    """Whether a mask [length, length] is the top left corner of a constant that hides exactly what comes later."""
    while (made := maker(mask)) is not None:
        starts = array(made.inputs[1]) if is_op(made, "Slice") else None
        steps = array(made.inputs[4]) if is_op(made, "Slice") and len(made.inputs) > 4 else None
        if starts is None or starts.any() or (steps is not None and (steps != 1).any()):
            return False
        mask = made.inputs[0]
    whole = array(mask)
    if whole is None or whole.ndim != 2 or whole.shape[0] != whole.shape[1]:
        return False
    later = np.triu(np.ones(whole.shape, bool), 1)
    return bool((whole[later] <= _HIDDEN).all() and not whole[~later].any())


def _split(value: ir.Value | None) -> tuple[ir.Node, ir.Node] | None:
    turned = maker(value)
    shaped = maker(turned.inputs[0]) if turned is not None and is_op(turned, "Transpose") else None
    if turned is None or shaped is None or not is_op(shaped, "Reshape"):
        return None
    return shaped, turned


def _last_sizes(value: ir.Value | None, count: int) -> list[int] | None:
    """The last entries of a Reshape's shape, a constant or a Concat that ends in constants; None where they vary."""
    shape = array(value)
    entries: list[int | None] = []
    if shape is not None:
        entries = [int(size) for size in shape]
    else:
        made = maker(value)
        if made is None or not is_op(made, "Concat"):
            return None
        for part in made.inputs:
            known = array(part)
            entries += [None] if known is None else [int(size) for size in known]
    found = [size for size in entries[-count:] if size is not None and size > 0]
    return found if len(found) == count else None
