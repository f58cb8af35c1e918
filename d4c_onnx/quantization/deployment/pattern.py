"""Finding multi-head attention in a graph: Softmax, the two products around it, and how heads are split and joined."""

from dataclasses import dataclass

import onnx

from d4c_onnx.graph.index import GraphIndex, integers_attribute


@dataclass(frozen=True, slots=True)
class Heads:
    """One attention as the export writes it.

    Attributes:
        query, key, value: float [batch, length, width], before they are split into heads.
        mask: what is added to the scores; None without one.
        softmax: the node.
        scores, mixed: the products before and behind it.
        split: the Reshape and Transpose of the query.
        join: the Transpose and Reshape that put the heads together again.
        heads: how many.
        width: of all heads together.
    """

    query: str
    key: str
    value: str
    mask: str | None
    softmax: onnx.NodeProto
    scores: onnx.NodeProto
    mixed: onnx.NodeProto
    split: tuple[onnx.NodeProto, onnx.NodeProto]
    join: tuple[onnx.NodeProto, onnx.NodeProto]
    heads: int
    width: int


def find_attention(index: GraphIndex, softmax: onnx.NodeProto) -> Heads | None:
    """The attention around a Softmax; None where it has another form (partly constant keys, quantised scores)."""
    before = index.producer.get(softmax.input[0])
    mask = None
    if before is not None and before.op_type == "Add":
        names = list(before.input)
        made = index.producer.get(names[0])
        first = 0 if made is not None and made.op_type == "MatMul" else 1
        before, mask = index.producer.get(names[first]), names[1 - first]
    mixed = index.only_consumer(softmax.output[0])
    if before is None or before.op_type != "MatMul" or mixed is None or mixed.op_type != "MatMul":
        return None
    ways = [_split(index, name) for name in (before.input[0], before.input[1], mixed.input[1])]
    turned = index.only_consumer(mixed.output[0])
    joined = index.only_consumer(turned.output[0]) if turned is not None else None
    if None in ways or turned is None or joined is None:
        return None
    if (turned.op_type, joined.op_type) != ("Transpose", "Reshape") or _perm(turned) != [0, 2, 1, 3]:
        return None
    (split_q, perm_q), (split_k, perm_k), (split_v, perm_v) = (way for way in ways if way is not None)
    if (perm_q, perm_k, perm_v) != ([0, 2, 1, 3], [0, 2, 3, 1], [0, 2, 1, 3]):
        return None
    shapes = {tuple(_last(index, node.input[1], 2) or ()) for node, _ in (split_q, split_k, split_v)}
    width = _last(index, joined.input[1], 1)
    if len(shapes) != 1 or len(shape := shapes.pop()) != 2 or width is None or shape[0] * shape[1] != width[0]:
        return None
    return Heads(
        split_q[0].input[0],
        split_k[0].input[0],
        split_v[0].input[0],
        mask,
        softmax,
        before,
        mixed,
        split_q,
        (turned, joined),
        shape[0],
        width[0],
    )


def mask_axes(index: GraphIndex, mask: str) -> int | None:
    """The axes of a mask: 2, [query, key]; 4, [batch or 1, heads or 1, query, key]; None where they are unknown."""
    maker = index.producer.get(mask)
    if maker is None:
        whole = index.array(mask)
        return None if whole is None else whole.ndim
    if maker.op_type == "Slice":
        return mask_axes(index, maker.input[0])
    if maker.op_type == "Reshape":
        shape = index.array(maker.input[1])
        return None if shape is None else len(shape)
    if maker.op_type == "Gather":  # of some rows
        rows = index.array(maker.input[1])
        return mask_axes(index, maker.input[0]) if rows is not None and rows.ndim == 1 else None
    return 4 if maker.op_type == "Unsqueeze" else None  # the pooled row's, one for each text


def _split(index: GraphIndex, name: str) -> tuple[tuple[onnx.NodeProto, onnx.NodeProto], list[int]] | None:
    turned = index.producer.get(name)
    shaped = index.producer.get(turned.input[0]) if turned is not None and turned.op_type == "Transpose" else None
    if turned is None or shaped is None or shaped.op_type != "Reshape":
        return None
    return (shaped, turned), _perm(turned)


def _perm(node: onnx.NodeProto) -> list[int]:
    return integers_attribute(node, "perm", 4, -1)


def _last(index: GraphIndex, name: str, count: int) -> list[int] | None:
    """The last entries of a Reshape's shape, a constant or a Concat that ends in constants; None where they vary."""
    shape = index.array(name)
    if shape is None:
        maker = index.producer.get(name)
        if maker is None or maker.op_type != "Concat":
            return None
        parts = [index.array(part) for part in maker.input]
        known = [None if part is None else [int(value) for value in part] for part in parts]
        entries: list[int | None] = []
        for part in known:
            entries += part or [None]
    else:
        entries = [int(value) for value in shape]
    found = [value for value in entries[-count:] if value is not None and value > 0]
    return found if len(found) == count else None
