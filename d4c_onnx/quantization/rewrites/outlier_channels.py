"""Outlier channels leave the integer product: what a few channels add to it is computed beside it, in float; exact.

Trained transformers have *massive activations*: one or two channels thirty times the others, behind a BERT's LayerNorms
and inside its MLPs. A grid that reaches them leaves the others a handful of levels, and shrinking them into the weights
(`smoothing`) only moves the trouble, or cannot be exact where the residual stream reads the same value. So

    W x = W' x + W[:, S] x[S],      W' = W with the columns S set to zero,

where S are a few channels (`_COUNTS`). The integer product keeps its shape; its activation may saturate in S, because
nothing multiplies it there, and so its range and its moments leave S out (`Plan.observed`). The second product has |S|
inputs and stays float.

A place is split where that takes the square error of its rounded activation, weighted by the columns that read it,
below `_THRESHOLD` of what it was.

Source: mixed-precision decomposition as in LLM.int8() (Dettmers et al., arXiv 2208.07339), with the channels chosen
once, from calibration data, instead of at every call.
"""

from collections.abc import Iterable

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import RangeObserver
from d4c_onnx.graph.layers import add_beside, is_plain, with_bias
from d4c_onnx.graph.values import (
    constant,
    is_op,
    name_of,
    node,
    nodes_by_name,
    only_reader,
    set_constant,
)
from d4c_onnx.manifest import Refusal
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.plan import NARROWEST, Plan
from d4c_onnx.quantization.rewrites.rewrite import Result
from d4c_onnx.recipe import QuantizationConfig

_COUNTS = (1, 2, 4)  # channels that may leave a product
_THRESHOLD = 0.25  # what of the error may remain where channels leave; each further step has to gain as much again
_EXTENT = 0.7  # what of the extent may be left: the error falls with its square, which at this is twice the threshold
_ROWS = 2048  # rows that an activation is judged by
_BATCH_ROWS = 64  # of each batch


def split_outliers(
    model: ir.Model,
    plan: Plan,
    reader: CalibrationDataReader,
    config: QuantizationConfig,
    *,
    symmetric: bool = False,
    provider: str = "cpu",
    threads: int = 0,
) -> tuple[Result, dict[str, tuple[int, ...]]]:
    """Split every activation that gains by it, in place.

    Args:
        symmetric: whether activations have zero point 0 in the middle of their grid.

    Returns:
        How many products were split and what was left alone; per activation the channels that its products no longer
        read. The graph has new nodes: make the plan anew.
    """
    places, refused = _places(model.graph, plan)
    rows = _look(model, plan, reader, places, provider, threads)
    chosen: dict[str, tuple[int, ...]] = {}
    count = 0
    for name, products in places.items():
        weight = sum(np.square(constant(product.inputs[1])).sum(1) for product in products)
        channels = _outliers(rows[name], np.asarray(weight), config, symmetric)
        if channels:
            _split(model.graph, products, channels)
            chosen[name] = channels
            count += len(products)
    if count:
        model.graph.sort()
    return Result(count, refused), chosen


def _places(graph: ir.Graph, plan: Plan) -> tuple[dict[str, list[ir.Node]], tuple[Refusal, ...]]:
    """Per quantised activation the products that read it, where all of them are plain and own their weight."""
    nodes = nodes_by_name(graph)
    quantised = set(plan.activations)
    places: dict[str, list[ir.Node]] = {}
    for layer in plan.layers:
        if layer.data in quantised:
            places.setdefault(layer.data, []).append(nodes[layer.node])
    refused = []
    for name, products in list(places.items()):
        if not all(_splits(product) for product in products):
            del places[name]
            if not any(is_op(product, "Conv") for product in products):
                refused.append(Refusal(name, "a product that reads it is not x W with a weight of its own"))
    return places, tuple(refused)


def _splits(product: ir.Node) -> bool:
    """x W with a weight of its own, whose sum is no output of the graph: that would have to keep its name."""
    weight, total = product.inputs[1], with_bias(product)
    plain = is_op(product, "MatMul") and is_plain(product)
    return plain and weight is not None and only_reader(weight) is product and not total.is_graph_output()


def _look(
    model: ir.Model, plan: Plan, reader: CalibrationDataReader, names: Iterable[str], provider: str, threads: int
) -> dict[str, np.ndarray]:
    """A sample of each activation's rows over all batches, float32 [rows, channels]; large ones are overrepresented."""
    found: dict[str, list[np.ndarray]] = {name: [] for name in names}
    if not found:
        return {}
    for batch in SegmentedEncoder(model, reader, provider, threads).advance(list(found)):
        for name, parts in found.items():
            values = plan.observed(name, batch[name])
            flat = values.reshape(-1, values.shape[-1])
            peaks = np.unique(np.abs(flat).argmax(0)) if len(flat) else np.zeros(0, np.int64)
            spread = np.arange(0, len(flat), max(1, len(flat) // _BATCH_ROWS))
            parts.append(flat[np.union1d(spread, peaks[:_BATCH_ROWS])])
    joined = {name: np.concatenate(parts) for name, parts in found.items()}
    return {name: rows[:: max(1, len(rows) // _ROWS)] for name, rows in joined.items()}


def _outliers(rows: np.ndarray, importance: np.ndarray, config: QuantizationConfig, symmetric: bool) -> tuple[int, ...]:
    """The channels that leave; none where too little is gained.

    Args:
        rows: float32 [rows, channels].
        importance: [channels], the sum of squares of the weights that read a channel.
    """
    if rows.shape[1] <= 2 * NARROWEST or not len(rows):
        return ()
    order = np.argsort(-np.abs(rows).max(0), kind="stable")
    if np.ptp(np.delete(rows, order[: _COUNTS[-1]], 1)) > _EXTENT * np.ptp(rows):  # the search takes 4 times as long
        return ()
    least = _error(rows, importance, config, symmetric)
    best: tuple[int, ...] = ()
    for count in _COUNTS:
        kept = np.delete(np.arange(rows.shape[1]), order[:count])
        error = _error(rows[:, kept], importance[kept], config, symmetric)
        if error < _THRESHOLD * least:
            least, best = error, tuple(sorted(int(channel) for channel in order[:count]))
    return best


def _error(rows: np.ndarray, importance: np.ndarray, config: QuantizationConfig, symmetric: bool) -> float:
    """Square error of rows on the grid that the range search would give them, weighted by channel."""
    observer = RangeObserver()
    observer.observe_extremes(rows)
    observer.observe_histogram(rows)
    grid = observer.mse(config.activation_bits, config.headroom, config.clip_weight, symmetric)
    return float(np.square(grid.round(rows) - rows).mean(0) @ importance)


def _split(graph: ir.Graph, products: list[ir.Node], channels: tuple[int, ...]) -> None:
    """Let products that read one value leave channels to float ones beside them."""
    data = products[0].inputs[0]
    assert data is not None
    index = set_constant(graph, f"{name_of(data)}_outlier_channels", np.array(channels, np.int64))
    gather = node("Gather", [data, index], f"{name_of(data)}_outliers", attributes={"axis": -1})
    graph.insert_before(products[0], gather)
    for product in products:
        weight, name = product.inputs[1], product.name or ""
        assert weight is not None
        values = np.array(constant(weight), np.float32)
        narrow = set_constant(graph, f"{name}_outlier_weight", values[list(channels)])
        values[list(channels)] = 0
        set_constant(graph, name_of(weight), values)
        beside = node("MatMul", [gather.outputs[0], narrow], f"{name}_outlier_product", name=f"{name}_outliers")
        add_beside(graph, product, beside, f"{name}_whole", f"{name}_add_outliers")
