"""Attention re-expressed as our own export writes it: one product a projection, heads split and joined in one way.

As in `models.plain_attention`: queries carry the scale, keys have no bias, which a softmax does not see, and that of
the values is part of the output projection's, because the weights of a row sum to 1. Exact up to float32 rounding.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir

from d4c_onnx.foreign.layout import Chain, chain_from, chain_to, moved
from d4c_onnx.foreign.probe import Probe, known_value, shape_name, sizes_only
from d4c_onnx.graph.values import is_op, maker, name_of, node, nodes_of, only_reader, prepend, readers, set_constant

_HIDDEN = -1e4  # what hides a score at least
_CAUSAL = "causal_mask"


@dataclass(frozen=True, slots=True)
class _Block:
    """One attention as somebody's exporter wrote it: three projections, a mask, a softmax, an output projection."""

    softmax: ir.Node
    chains: tuple[Chain, Chain, Chain]
    operands: tuple[ir.Value, ir.Value, ir.Value]
    factors: tuple[tuple[ir.Value, bool], ...]
    mask: ir.Value | None
    mixed: ir.Value
    out: Chain


@dataclass(frozen=True, slots=True)
class _Plain:
    """What a block does, told by where elements go.

    Attributes:
        heads: how many.
        columns: of each projection's matrix, those of the heads side by side.
        rows: of the output projection's matrix, likewise.
        turned: whether what queries, and keys and values, are made of is [length, batch, width].
        end: the last value of the chain behind the output projection that is [batch, length, width]; and
        end_turned: whether it is [length, batch, width].
        scale: of the scores.
        mask: None; `causal`; or `kept`, which is added as it is.
    """

    heads: int
    columns: tuple[np.ndarray, np.ndarray, np.ndarray]
    rows: np.ndarray
    turned: tuple[bool, bool]
    end: ir.Value
    end_turned: bool
    scale: float
    mask: str | None


def express_attentions(model: ir.Model, probe: Probe, context: int | None) -> int:
    """Re-express every attention whose form is understood, in place; how many.

    Args:
        probe: of this very model.
        context: positions of the longest text; None for images.
    """
    blocks = [block for softmax in nodes_of(model.graph, "Softmax") if (block := _block(softmax)) is not None]
    if not blocks:
        return 0
    seen = probe.look(*_asked(blocks))
    count = 0
    for block in blocks:
        plain = _understand(block, seen, [len(feed) for feed in probe.feeds])
        if plain is not None:
            _express(model.graph, block, plain, context)
            count += 1
    return count


def _block(softmax: ir.Node) -> _Block | None:
    scores, mask, factors = _scores(softmax.inputs[0])
    weights = _guarded(softmax.outputs[0])
    mixed = only_reader(weights)
    if scores is None or mixed is None or not is_op(mixed, "MatMul") or mixed.inputs[0] is not weights:
        return None
    operands = (scores.inputs[0], scores.inputs[1], mixed.inputs[1])
    chains = [chain_to(value) for value in operands]
    out = chain_from(mixed.outputs[0])
    query, key, value = chains
    if out is None or query is None or key is None or value is None or None in operands:
        return None
    return _Block(softmax, (query, key, value), operands, factors, mask, mixed.outputs[0], out)  # type: ignore[arg-type]


def _scores(
    value: ir.Value | None,
) -> tuple[ir.Node | None, ir.Value | None, tuple[tuple[ir.Value, bool], ...]]:
    """The product of queries and keys behind a softmax's input, what is added to it, and scalars that scale it."""
    mask, factors = None, []
    made = maker(value)
    if made is not None and is_op(made, "Add"):
        place = 0 if _is_scored(made.inputs[0]) else 1
        mask, made = made.inputs[1 - place], maker(made.inputs[place])
    while made is not None and is_op(made, "Mul", "Div"):
        place = 0 if _is_scored(made.inputs[0]) else 1
        factor = made.inputs[1 - place]
        if factor is None:
            return None, None, ()
        factors.append((factor, is_op(made, "Mul")))
        made = maker(made.inputs[place])
    return (made if made is not None and is_op(made, "MatMul") else None), mask, tuple(factors)


def _is_scored(value: ir.Value | None) -> bool:
    made = maker(value)
    while made is not None and is_op(made, "Mul", "Div"):
        made = maker(made.inputs[0])
    return made is not None and is_op(made, "MatMul")


def _guarded(weights: ir.Value) -> ir.Value:
    """The weights themselves, or behind them a Where that makes rows without any visible token 0 instead of NaN."""
    found = readers(weights)
    where = next((entry for entry in found if is_op(entry, "Where")), None)
    asked = next((entry for entry in found if is_op(entry, "IsNaN")), None)
    if where is None or asked is None or len(found) != 2 or maker(where.inputs[0]) is not asked:
        return weights
    return where.outputs[0] if where.inputs[2] is weights else weights


def _asked(blocks: Sequence[_Block]) -> tuple[list[ir.Value], list[ir.Value]]:
    """What has to be seen of blocks: values, and shapes of others."""
    values, shapes = [], []
    for block in blocks:
        for chain in (*block.chains, block.out):
            values += chain.helpers()
            shapes += [chain.source, chain.linear.outputs[0]]
        values += [factor for factor, _ in block.factors]
        if block.mask is not None and sizes_only(block.mask):
            values.append(block.mask)
        shapes += [block.mixed, *([] if block.mask is None or maker(block.mask) is None else [block.mask])]
    return values, shapes


def _understand(block: _Block, seen: Sequence[dict[str, np.ndarray]], batches: Sequence[int]) -> _Plain | None:
    """What a block does on every feed; None where it is no attention over [batch, length, width], or not always one."""
    found = [_on_one_feed(block, values, batch) for values, batch in zip(seen, batches, strict=True)]
    first = found[0]
    if first is None or any(other is None or _form(other) != _form(first) for other in found[1:]):
        return None
    return first


def _form(plain: _Plain) -> tuple[object, ...]:
    """What has to be equal on every feed."""
    columns = tuple(tuple(some.tolist()) for some in (*plain.columns, plain.rows))
    return plain.heads, plain.turned, plain.end, plain.end_turned, plain.mask, round(plain.scale, 6), columns


def _on_one_feed(block: _Block, seen: dict[str, np.ndarray], batch: int) -> _Plain | None:
    """What a block does with a batch of that size, told by the numbers of elements."""
    split = [_split(chain, operand, seen, batch) for chain, operand in zip(block.chains, range(3), strict=True)]
    query, key, value = split
    if query is None or key is None or value is None:
        return None
    if len({entry.heads for entry in split if entry}) != 1 or key.turned != value.turned or key.length != value.length:
        return None
    scale = 1.0
    for factor, times in (*block.factors, *block.chains[0].factors, *block.chains[1].factors):
        number = known_value(factor, seen)
        if number is None or np.size(number) != 1:
            return None
        scale = scale * float(np.ravel(number)[0]) if times else scale / float(np.ravel(number)[0])
    if block.chains[2].factors:
        return None
    joined = _joined(block, seen, (batch, query.heads, query.length, len(value.columns) // query.heads))
    mask = _mask_of(block, seen, query.length, key.length)
    if joined is None or mask == "unknown":
        return None
    rows, end, end_turned = joined
    columns = (query.columns, key.columns, value.columns)
    return _Plain(query.heads, columns, rows, (query.turned, key.turned), end, end_turned, scale, mask)


@dataclass(frozen=True, slots=True)
class _Split:
    """Heads of one projection: columns of its matrix, side by side, and the order of what it reads."""

    heads: int
    length: int
    columns: np.ndarray
    turned: bool


def _split(chain: Chain, operand: int, seen: dict[str, np.ndarray], batch: int) -> _Split | None:
    """Follow a projection from [batch, length, width] (or [length, batch, width]) to [batch, heads, length, depth]."""
    shape = seen[shape_name(name_of(chain.source))]
    given = np.arange(int(np.prod(shape))).reshape(shape)
    rows = moved(given, chain.before, seen)
    made = seen[shape_name(name_of(chain.linear.outputs[0]))]
    heads = moved(np.arange(int(np.prod(made))).reshape(made), chain.behind, seen)
    if len(shape) != 3 or batch not in shape[:2] or rows is None or heads is None:
        return None
    read = _rows_of(rows, shape[2])
    if operand == 1:  # keys are turned: [.., depth, length]
        heads = heads.swapaxes(-1, -2)
    if heads.ndim == 3:
        heads = heads.reshape(batch, -1, *heads.shape[1:])
    if read is None or heads.ndim != 4 or len(heads) != batch:
        return None
    length = heads.shape[2]
    turned = tuple(shape[:2]) != (batch, length)
    if turned and tuple(shape[:2]) != (length, batch):
        return None
    token, column = np.divmod(heads, made[-1])
    expected = _tokens(batch, length, turned)[:, None, :, None]
    columns = column[:1, :, :1]
    if not (read[token] == expected).all() or not (column == columns).all():
        return None
    return _Split(heads.shape[1], length, columns.reshape(-1), turned)


def _rows_of(numbers: np.ndarray, width: int) -> np.ndarray | None:
    """Which row of [.., width] each row is; None where they are taken apart."""
    flat = numbers.reshape(-1, numbers.shape[-1])
    if flat.shape[1] != width or not (flat == flat[:, :1] + np.arange(width)).all() or (flat[:, 0] % width).any():
        return None
    return flat[:, 0] // width


def _tokens(batch: int, length: int, turned: bool) -> np.ndarray:
    """Numbers of the rows of [batch, length, ..] or [length, batch, ..], as [batch, length]."""
    return (
        np.arange(batch * length)
        .reshape((length, batch) if turned else (batch, length))
        .transpose((1, 0) if turned else (0, 1))
    )


def _joined(
    block: _Block, seen: dict[str, np.ndarray], sizes: tuple[int, int, int, int]
) -> tuple[np.ndarray, ir.Value, bool] | None:
    """Follow the mixture [batch, heads, length, depth] to the output projection and behind it."""
    batch, heads, length, depth = sizes
    shape, width = seen[shape_name(name_of(block.mixed))], heads * depth
    if int(np.prod(shape)) != batch * length * width:
        return None
    moved_in = moved(np.arange(batch * length * width).reshape(shape), block.out.before, seen)
    if moved_in is None or moved_in.shape[-1] != width:
        return None
    flat = moved_in.reshape(-1, width)
    image, rest = np.divmod(flat, width * length)
    head, rest = np.divmod(rest, length * depth)
    token, inner = np.divmod(rest, depth)
    rows = (head * depth + inner)[0]
    own = image * length + token  # of [batch, length]
    if not (head * depth + inner == rows).all() or not (own == own[:, :1]).all():
        return None
    made = seen[shape_name(name_of(block.out.linear.outputs[0]))]
    wide = int(made[-1])
    numbers = np.arange(int(np.prod(made))).reshape(made)
    best: tuple[np.ndarray, ir.Value, bool] | None = None
    places = ((), *(block.out.behind[: stop + 1] for stop in range(len(block.out.behind))))
    for nodes in places:
        found = moved(numbers, nodes, seen)
        end = nodes[-1][1] if nodes else block.out.linear.outputs[0]
        if found is None or found.ndim != 3 or (read := _rows_of(found, wide)) is None:
            continue
        if block.out.bias is not None and is_op(block.out.linear, "MatMul") and not nodes:
            continue  # its bias is still to come
        for turned in (False, True):
            sides = (length, batch) if turned else (batch, length)
            order = np.argsort(_tokens(batch, length, turned).reshape(-1))  # [batch, length] rows as they lie there
            if found.shape[:2] == sides and np.array_equal(own[read, 0], order):
                best = (np.argsort(rows), end, turned)
    return best


def _mask_of(block: _Block, seen: dict[str, np.ndarray], length: int, keys: int) -> str | None:
    """None, `causal`, `kept`, or `unknown`."""
    if block.mask is None:
        return None
    whole = known_value(block.mask, seen) if sizes_only(block.mask) else None
    if whole is None:
        return "kept" if len(seen[shape_name(name_of(block.mask))]) in (2, 4) else "unknown"
    if whole.ndim > 4 or whole.shape[-2:] not in ((length, keys), (1, keys)):
        return "unknown"
    flat = np.broadcast_to(whole, (*whole.shape[:-2], length, keys)).reshape(-1, length, keys)
    if not flat.any():
        return None
    later = np.triu(np.ones((length, keys), bool), 1)
    if length == keys and (flat[:, later] <= _HIDDEN).all() and not flat[:, ~later].any():
        return "causal"
    return "kept" if whole.ndim in (2, 4) else "unknown"


def _express(graph: ir.Graph, block: _Block, plain: _Plain, context: int | None) -> None:
    """Put the plain form in place of a block."""
    name, (query, key, value) = block.softmax.name or "attention", block.chains
    nodes: list[ir.Node] = []

    def then(op: str, inputs: Sequence[ir.Value | None], what: str, **attributes: object) -> ir.Value:
        made = node(op, inputs, f"{name}_{what}", attributes=attributes)
        nodes.append(made)
        return made.outputs[0]

    def const(what: str, values: np.ndarray) -> ir.Value:
        return set_constant(graph, f"{name}_{what}", values)

    def projected(chain: Chain, columns: np.ndarray, turned: bool, what: str, scale: float = 1.0) -> ir.Value:
        source = then("Transpose", [chain.source], f"{what}_read", perm=[1, 0, 2]) if turned else chain.source
        matrix = chain.matrix()[:, columns] * np.float32(scale)
        product = then("MatMul", [source, const(f"{what}_weight", matrix)], f"{what}_product")
        bias = chain.vector()[columns] * np.float32(scale)
        return then("Add", [product, const(f"{what}_bias", bias)], what) if what == "query" and bias.any() else product

    def split(whole: ir.Value, columns: np.ndarray, what: str, perm: list[int]) -> ir.Value:
        shape = const(f"{what}_heads", np.array([0, 0, plain.heads, len(columns) // plain.heads], np.int64))
        return then("Transpose", [then("Reshape", [whole, shape], f"{what}_apart")], f"{what}_split", perm=perm)

    columns, (turned, keys_turned) = plain.columns, plain.turned
    q = split(projected(query, columns[0], turned, "query", plain.scale), columns[0], "query", [0, 2, 1, 3])
    k = split(projected(key, columns[1], keys_turned, "key"), columns[1], "key", [0, 2, 3, 1])
    v = split(projected(value, columns[2], keys_turned, "value"), columns[2], "value", [0, 2, 1, 3])
    scores = then("MatMul", [q, k], "scores")
    mask = _causal_mask(graph, context) if plain.mask == "causal" else block.mask if plain.mask else None
    if mask is not None:
        scores = then("Add", [scores, mask], "masked")
    mixed = then("MatMul", [then("Softmax", [scores], "weights", axis=-1), v], "mixed")
    whole = const("joined_shape", np.array([0, 0, len(columns[2])], np.int64))
    joined = then("Reshape", [then("Transpose", [mixed], "turned", perm=[0, 2, 1, 3]), whole], "joined")
    matrix = block.out.matrix()[plain.rows]
    bias = block.out.vector() + value.vector()[columns[2]] @ matrix
    end = then("MatMul", [joined, const("output_weight", matrix)], "output_product")
    end = then("Add", [end, const("output_bias", bias.astype(np.float32))], "output")
    if plain.end_turned:
        end = then("Transpose", [end], "output_turned", perm=[1, 0, 2])
    made = maker(plain.end)
    assert made is not None  # the last of the chain
    graph.insert_after(made, nodes)
    plain.end.replace_all_uses_with(end, replace_graph_outputs=True)


def _causal_mask(graph: ir.Graph, context: int | None) -> ir.Value:
    """float32 [length, length], the top left corner of one constant; made once."""
    for entry in graph:
        if entry.name == _CAUSAL:
            return entry.outputs[0]
    ids = graph.inputs[0]
    length = ids.shape[1] if ids.shape is not None else None
    longest = context or (length if isinstance(length, int) else 0)
    values = np.triu(np.full((longest, longest), -np.inf, np.float32), 1)
    whole = set_constant(graph, f"{_CAUSAL}_whole", values)
    start = set_constant(graph, f"{_CAUSAL}_start", np.array([0, 0]))
    axes = set_constant(graph, f"{_CAUSAL}_axes", np.array([0, 1]))
    size = node("Shape", [ids], f"{_CAUSAL}_length", attributes={"start": 1, "end": 2})
    ends = node("Concat", [size.outputs[0], size.outputs[0]], f"{_CAUSAL}_ends", attributes={"axis": 0})
    sliced = node("Slice", [whole, start, ends.outputs[0], axes], _CAUSAL)
    prepend(graph, [size, ends, sliced])
    return sliced.outputs[0]
