"""The start token of a causal text tower: a constant that need not be quantised.

Every prompt begins with the same token, and under a causal mask nothing comes before it: its row of every activation
is the same vector for every prompt. In real CLIPs that vector holds the largest outliers of the tower, and a per-tensor
grid that must reach them is coarse for everybody else. But other tokens see the start token only through attention's
keys and values, so if its rows of k and v are written into the graph as float constants,

    k' = Where(first row, constant, k),      v' likewise,

whatever happens to the row elsewhere no longer reaches any output, and ranges and second moments may leave it out.
The result is exact for every input that begins with the start token, as tokenizers make them; whether the row is really
dead is tried out, by feeding another first token and comparing the output bit by bit.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.graph.attention import find_attentions
from d4c_onnx.graph.layers import linear_source
from d4c_onnx.graph.model import drop_unused
from d4c_onnx.graph.values import maker, name_of, node, only_reader, prepend, set_constant, value_named
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rewrites.rewrite import Result
from d4c_onnx.runtime.session import EncoderSession

_WIDER = 1.25  # the start token is pinned when it widens some layer's input range by this factor


def dead_start_rows(
    model: ir.Model, plan: Plan, reader: CalibrationDataReader, *, provider: str = "cpu", threads: int = 0
) -> frozenset[str]:
    """Inputs of weighted layers whose first row (of axis 1) may be ignored once `pin_start_token` has been applied.

    Empty where the encoder has no start token, where it is no outlier, and where pinning would not be exact.
    """
    prompts = _prompts(reader)
    if not prompts:
        return frozenset()
    names = list(dict.fromkeys(layer.data for layer in plan.layers))
    first: dict[str, np.ndarray] = {}
    rest: dict[str, list[float]] = {}
    dropped: set[str] = set()
    batches = SegmentedEncoder(model, reader, provider, threads).advance(names)
    for ids, values in zip(prompts, batches, strict=True):
        for name in names:
            value = values[name]
            if value.ndim != 3 or value.shape[:2] != ids.shape:
                dropped.add(name)
                continue
            row = first.setdefault(name, value[0, 0])
            if np.abs(value[:, 0] - row).max() > 1e-4 * max(1.0, float(np.abs(row).max())):
                dropped.add(name)
            if value.shape[1] > 1:
                low, high = rest.get(name, [0.0, 0.0])
                rest[name] = [min(low, float(value[:, 1:].min())), max(high, float(value[:, 1:].max()))]
    constant = [name for name in names if name not in dropped and name in rest]
    if not constant or not any(_wider(first[name], rest[name]) for name in constant):
        return frozenset()
    trial = model.clone()
    pinned = pin_start_token(trial, reader, provider=provider, threads=threads)
    if not pinned.count or not _is_dead(trial, prompts[0]):
        return frozenset()
    return frozenset(constant)


def pin_start_token(
    model: ir.Model, reader: CalibrationDataReader, *, provider: str = "cpu", threads: int = 0
) -> Result:
    """Write the start token's keys and values into the graph as constants, in place."""
    names, refused = _keys_and_values(model.graph)
    prompts = _prompts(reader)
    if not names or not prompts:
        return Result(0, tuple(refused))
    if len({int(first) for ids in prompts for first in ids[:, 0]}) != 1:
        return Result(0, (Refusal(name_of(model.graph.inputs[0]), "prompts begin with different tokens"),))
    rows: dict[str, np.ndarray] = {}
    for batch in SegmentedEncoder(model, reader, provider, threads).advance(names):
        for name in names:
            rows.setdefault(name, batch[name][0, 0])
    is_first = _mark_first_row(model.graph)
    for name in names:
        value = value_named(model.graph, name)
        row = set_constant(model.graph, f"{name}_start", rows[name].astype(np.float32))
        where = node("Where", [is_first, row, value], f"{name}_pinned")
        value.replace_all_uses_with(where.outputs[0])
        where.replace_input_with(2, value)
        made = maker(value)
        assert made is not None  # a linear layer's
        model.graph.insert_after(made, where)
    drop_unused(model)
    return Result(len(names))


def _keys_and_values(graph: ir.Graph) -> tuple[list[str], list[Refusal]]:
    """The [batch, length, width] values that become attention's keys and values, of every block; none unless all."""
    found, refused = find_attentions(graph)
    values = [value for attention in found for value in (attention.key, attention.value)]
    refused += [
        Refusal(name_of(value), "keys or values are not what one linear layer makes for this attention alone")
        for value in values
        if linear_source(value) is None or only_reader(value) is None
    ]
    return ([] if refused else list(dict.fromkeys(map(name_of, values)))), refused


def _mark_first_row(graph: ir.Graph) -> ir.Value:
    """bool [length, 1], true for the first row; its nodes are put in front."""
    zero, one = (
        set_constant(graph, f"start_token_{name}", np.array(value, np.int64))
        for name, value in (("zero", 0), ("one", 1))
    )
    last = set_constant(graph, "start_token_last", np.array([1]))
    sizes = {"start": 1, "end": 2}
    nodes = [node("Shape", [graph.inputs[0]], "start_token_length_1d", name="start_token_shape", attributes=sizes)]

    def then(op: str, inputs: Iterable[ir.Value], output: str, name: str) -> ir.Value:
        nodes.append(node(op, inputs, output, name=name))
        return nodes[-1].outputs[0]

    length = then("Squeeze", [nodes[0].outputs[0]], "start_token_length", "start_token_squeeze")
    positions = then("Range", [zero, length, one], "start_token_positions", "start_token_range")
    mark = then("Equal", [positions, zero], "start_token_mark", "start_token_equal")
    first = then("Unsqueeze", [mark, last], "start_token_first", "start_token_column")
    prepend(graph, nodes)
    return first


def _is_dead(pinned: ir.Model, ids: np.ndarray) -> bool:
    """Whether the first token no longer matters to the output."""
    session = EncoderSession.of_model(pinned, threads=1)
    other = ids.copy()
    other[:, 0] = 0 if int(ids[0, 0]) else 1
    return bool(np.array_equal(session.run(ids), session.run(other)))


def _prompts(reader: CalibrationDataReader) -> list[np.ndarray]:
    """All batches of token ids, int64 [batch, length]; empty for an image encoder."""
    reader.rewind()
    batches = []
    while (feed := reader.get_next()) is not None:
        batch = next(iter(feed.values()))
        if batch.ndim != 2 or not np.issubdtype(batch.dtype, np.integer):
            return []
        batches.append(batch)
    return batches


def _wider(start: np.ndarray, rest: list[float]) -> bool:
    low, high = rest
    with_start = max(high, float(start.max())) - min(low, float(start.min()))
    return with_start > _WIDER * max(high - low, 1e-12)
