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

import copy

import numpy as np
import onnx
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.graph.index import GraphIndex, replace_nodes, set_initializer
from d4c_onnx.graph.layers import linear_source
from d4c_onnx.quantization.folding.places import through_heads
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.segments import SegmentedEncoder
from d4c_onnx.recipe import QuantizationSection
from d4c_onnx.runtime.session import EncoderSession

_WIDER = 1.25  # `auto` pins when the start token widens some layer's input range by this factor


def dead_start_rows(
    model: onnx.ModelProto,
    plan: Plan,
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    provider: str = "cpu",
    threads: int = 0,
) -> frozenset[str]:
    """Inputs of weighted layers whose first row (of axis 1) may be ignored once `pin_start_token` has been applied.

    Empty where the encoder has no start token, where pinning would not be exact, and, under `auto`, where the start
    token is no outlier.
    """
    prompts = _prompts(reader)
    if section.start_token == "keep" or not prompts:
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
    if not constant or (section.start_token == "auto" and not any(_wider(first[n], rest[n]) for n in constant)):
        return frozenset()
    trial = copy.deepcopy(model)
    pinned = pin_start_token(trial, plan, reader, provider=provider, threads=threads)
    if not pinned or not _is_dead(trial, prompts[0]):
        return frozenset()
    return frozenset(constant)


def pin_start_token(
    model: onnx.ModelProto, plan: Plan, reader: CalibrationDataReader, *, provider: str = "cpu", threads: int = 0
) -> int:
    """Write the start token's keys and values into the graph as constants, in place; returns how many."""
    graph = model.graph
    values = _keys_and_values(graph, plan)
    prompts = _prompts(reader)
    if not values or not prompts or len({int(first) for ids in prompts for first in ids[:, 0]}) != 1:
        return 0
    rows: dict[str, np.ndarray] = {}
    for batch in SegmentedEncoder(model, reader, provider, threads).advance(values):
        for name in values:
            rows.setdefault(name, batch[name][0, 0])
    input_name = graph.input[0].name
    is_first = _mark_first_row(graph, input_name)
    for name in values:
        constant, pinned = f"{name}_start", f"{name}_pinned"
        set_initializer(graph, constant, rows[name].astype(np.float32))
        position = next(number for number, node in enumerate(graph.node) if name in node.output)
        for reader_node in GraphIndex(graph).consumers[name]:
            for slot, entry in enumerate(reader_node.input):
                if entry == name:
                    reader_node.input[slot] = pinned
        graph.node.insert(position + 1, helper.make_node("Where", [is_first, constant, name], [pinned], name=pinned))
    return len(values)


def _keys_and_values(graph: onnx.GraphProto, plan: Plan) -> list[str]:
    """The [batch, length, width] values that become attention's keys and values, of every block."""
    index = GraphIndex(graph)
    by_node = {layer.node: layer for layer in plan.layers}
    found: dict[str, None] = {}
    for softmax in graph.node:
        if softmax.op_type != "Softmax":
            continue
        mix = index.only_consumer(softmax.output[0])
        scores = index.producer.get(softmax.input[0])
        while scores is not None and scores.op_type in ("Add", "Mul", "Div"):  # mask, scale
            inner = [index.producer.get(name) for name in scores.input]
            scores = next((node for node in inner if node is not None and node.op_type in ("MatMul", "Add")), None)
        if mix is None or mix.op_type != "MatMul" or scores is None or scores.op_type != "MatMul":
            return []
        for product in (scores, mix):
            value = through_heads(index, product.input[1])
            if value is None or linear_source(index, by_node, value) is None:
                return []
            found[value] = None
    return list(found)


def _mark_first_row(graph: onnx.GraphProto, input_name: str) -> str:
    """bool [length, 1], true for the first row; its nodes are put in front."""
    for name, values in (("zero", np.array(0, np.int64)), ("one", np.array(1, np.int64)), ("last", np.array([1]))):
        set_initializer(graph, f"start_token_{name}", values)
    nodes = [
        helper.make_node("Shape", [input_name], ["start_token_length_1d"], name="start_token_shape", start=1, end=2),
        helper.make_node("Squeeze", ["start_token_length_1d"], ["start_token_length"], name="start_token_squeeze"),
        helper.make_node(
            *("Range", ["start_token_zero", "start_token_length", "start_token_one"], ["start_token_positions"]),
            name="start_token_range",
        ),
        helper.make_node(
            *("Equal", ["start_token_positions", "start_token_zero"], ["start_token_mark"]), name="start_token_equal"
        ),
        helper.make_node(
            *("Unsqueeze", ["start_token_mark", "start_token_last"], ["start_token_first"]), name="start_token_column"
        ),
    ]
    replace_nodes(graph, [*nodes, *graph.node])
    return "start_token_first"


def _is_dead(pinned: onnx.ModelProto, ids: np.ndarray) -> bool:
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
