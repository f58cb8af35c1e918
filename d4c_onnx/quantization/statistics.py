"""Second-order statistics of what reaches each weighted layer: what a learned rounding needs to know of the data.

For a layer y = W x + b, x is the input in the float encoder and x^ the input as the quantised encoder delivers it:
rounded to its grid and, in the sequential mode, carrying the errors of all layers before. Only sums are kept, so
memory does not grow with the number of samples.
"""

import copy
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import onnx
from onnx import helper
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.files import without_weights
from d4c_onnx.graph.index import (
    GraphIndex,
    attribute,
    integer_attribute,
    integers_attribute,
    replace_nodes,
    set_initializer,
)
from d4c_onnx.graph.layers import WeightedLayer
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.segments import SegmentedEncoder


@dataclass(slots=True)
class InputStatistics:
    """Sums over all input rows of one layer; `groups` is 1 except for grouped convolutions.

    Attributes:
        gram: float64 [groups, inputs, inputs], sum of x^ x^T.
        cross: float64 [groups, inputs, inputs], sum of x x^T (first index x, second x^).
        total, total_quantized: float64 [groups, inputs], sums of x and of x^.
        count: rows seen.
    """

    gram: np.ndarray
    cross: np.ndarray
    total: np.ndarray
    total_quantized: np.ndarray
    count: int = 0
    _waiting: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)

    def add(self, rows: np.ndarray, quantized: np.ndarray) -> None:
        """Add a batch; both float32 [groups, rows, inputs]. `flush` after the last one.

        Prompts come in batches of a few dozen rows; adding each to matrices of millions of entries would cost more
        than the products themselves, so rows wait until there are as many of them as inputs.
        """
        self._waiting.append((rows, quantized))
        if sum(part.shape[1] for part, _ in self._waiting) >= rows.shape[2]:
            self.flush()

    def flush(self) -> None:
        """Add the rows that wait."""
        if not self._waiting:
            return
        rows, quantized = (np.concatenate(parts, axis=1) for parts in zip(*self._waiting, strict=True))
        self._waiting.clear()
        self.gram += quantized.transpose(0, 2, 1) @ quantized
        self.cross += rows.transpose(0, 2, 1) @ quantized
        self.total += rows.sum(1, dtype=np.float64)
        self.total_quantized += quantized.sum(1, dtype=np.float64)
        self.count += rows.shape[1]

    def means(self) -> tuple[np.ndarray, np.ndarray]:
        """Mean of x and of x^, float64 [groups, inputs] each."""
        return self.total / self.count, self.total_quantized / self.count

    def covariances(self) -> tuple[np.ndarray, np.ndarray]:
        """(cov(x^, x^), cov(x, x^)), float64 [groups, inputs, inputs]: the means are the bias's business."""
        mean, mean_quantized = self.means()
        gram = self.gram / self.count - mean_quantized[:, :, None] * mean_quantized[:, None, :]
        cross = self.cross / self.count - mean[:, :, None] * mean_quantized[:, None, :]
        return gram, cross

    def moments(self, centred: bool) -> tuple[np.ndarray, np.ndarray]:
        """(E[x^ x^T], E[x x^T]), or the covariances when a bias takes up the means."""
        return self.covariances() if centred else (self.gram / self.count, self.cross / self.count)


def new_statistics(groups: int, inputs: int) -> InputStatistics:
    """Empty sums."""
    square, line = (groups, inputs, inputs), (groups, inputs)
    return InputStatistics(np.zeros(square), np.zeros(square), np.zeros(line), np.zeros(line))


class StatisticsCollector:
    """Runs the float encoder and its fake-quantised twin side by side, from the first layer to the last.

    The twin starts as the float graph with a QuantizeLinear / DequantizeLinear pair before every quantised input; as
    layers are rounded, `replace` gives it their new weights, so that later layers see the errors they must repair.
    """

    def __init__(
        self,
        model: onnx.ModelProto,
        plan: Plan,
        ranges: Mapping[str, QuantParams],
        reader: CalibrationDataReader,
        provider: str = "cpu",
        threads: int = 0,
    ) -> None:
        self._plan, self._ranges = plan, ranges
        self._index = GraphIndex(model.graph)
        self._nodes = {node.name: node for node in model.graph.node}
        self._plain = SegmentedEncoder(model, reader, provider, threads)
        twin = fake_quantize(without_weights(model), plan, ranges)
        self._twin = SegmentedEncoder(twin, reader, provider, threads, weights=model)

    def replace(self, name: str, values: np.ndarray) -> None:
        """Give the twin an initialiser's new float values."""
        self._twin.replace(name, values)

    def collect(self, layers: Sequence[WeightedLayer]) -> dict[str, InputStatistics]:
        """Statistics per data input of the given layers, over all samples. Layers that share an input share them.

        Calls go through the graph in order: a layer that an earlier call has passed cannot be asked for again.
        """
        kinds = {layer.data: layer for layer in layers}
        found: dict[str, InputStatistics] = {}
        exact = self._plain.advance(list(kinds))
        rounded_name = {name: quantized_name(name) if name in self._ranges else name for name in kinds}
        rounded = self._twin.advance(list(rounded_name.values()))
        for plain, twin in zip(exact, rounded, strict=True):
            for name, layer in kinds.items():
                node, shape = self._nodes[layer.node], tuple(self._index.initializers[layer.weight].dims)
                rows = input_rows(self._plan.observed(name, plain[name]), node, shape)
                quantized = input_rows(self._plan.observed(name, twin[rounded_name[name]]), node, shape)
                if name not in found:
                    found[name] = new_statistics(rows.shape[0], rows.shape[2])
                found[name].add(rows, quantized)
        for statistics in found.values():
            statistics.flush()
        return found


def quantized_name(name: str) -> str:
    """The value that carries an activation after its QuantizeLinear / DequantizeLinear pair in the twin."""
    return f"{name}_fake_quantized"


def fake_quantize(model: onnx.ModelProto, plan: Plan, ranges: Mapping[str, QuantParams]) -> onnx.ModelProto:
    """The float graph with every quantised activation rounded to its grid before the nodes of the plan."""
    twin = copy.deepcopy(model)
    graph = twin.graph
    chosen = set(plan.nodes)
    used: dict[str, None] = {}
    for node in graph.node:
        if node.name in chosen:
            for position, name in enumerate(node.input):
                if name in ranges:
                    node.input[position] = quantized_name(name)
                    used[name] = None
    pairs: dict[str, list[onnx.NodeProto]] = {}
    for name in used:
        params = ranges[name]
        low, high = params.range
        set_initializer(graph, f"{name}_fq_scale", np.array(params.scale, np.float32))
        set_initializer(graph, f"{name}_fq_zero_point", np.array(params.zero_point, np.uint8))
        set_initializer(graph, f"{name}_fq_low", np.array(low, np.float32))
        set_initializer(graph, f"{name}_fq_high", np.array(high, np.float32))
        grid = [f"{name}_fq_scale", f"{name}_fq_zero_point"]
        pairs[name] = [
            helper.make_node("Clip", [name, f"{name}_fq_low", f"{name}_fq_high"], [f"{name}_fq_clip"]),
            helper.make_node("QuantizeLinear", [f"{name}_fq_clip", *grid], [f"{name}_fq_integer"]),
            helper.make_node("DequantizeLinear", [f"{name}_fq_integer", *grid], [quantized_name(name)]),
        ]
    # each pair right after the node it rounds: the order of the float graph stays
    ordered = [node for value in graph.input for node in pairs.get(value.name, [])]
    for node in graph.node:
        ordered.append(node)
        ordered.extend(pair for name in node.output for pair in pairs.get(name, []))
    replace_nodes(graph, ordered)
    return twin


def input_rows(values: np.ndarray, node: onnx.NodeProto, weight_shape: tuple[int, ...]) -> np.ndarray:
    """A layer's input as the rows its weight multiplies: float32 [groups, rows, inputs per group].

    For a convolution each row is one patch, in the weight's own order [channels, kernel height, kernel width].
    """
    if node.op_type != "Conv":
        flat = values if not attribute(node, "transA", 0) else values.swapaxes(-1, -2)
        return flat.reshape(1, -1, flat.shape[-1])
    groups = integer_attribute(node, "group", 1)
    kernel = weight_shape[2:]
    strides, dilations = (
        integers_attribute(node, "strides", len(kernel)),
        integers_attribute(node, "dilations", len(kernel)),
    )
    pads = integers_attribute(node, "pads", 2 * len(kernel), 0)
    edges = [(0, 0), (0, 0), *zip(pads[: len(kernel)], pads[len(kernel) :], strict=True)]
    padded = np.pad(values, edges)
    spans = tuple((size - 1) * step + 1 for size, step in zip(kernel, dilations, strict=True))
    axes = tuple(range(2, 2 + len(kernel)))
    windows = np.lib.stride_tricks.sliding_window_view(padded, spans, axes)
    every: list[Any] = [slice(None, None, stride) for stride in strides]
    inside: list[Any] = [slice(None, None, step) for step in dilations]
    windows = windows[(slice(None), slice(None), *every, *inside)]
    batch, channels = values.shape[:2]
    space = windows.shape[2 : 2 + len(kernel)]
    split = windows.reshape(batch, groups, channels // groups, *space, *kernel)
    order = (1, 0, *range(3, 3 + len(kernel)), 2, *range(3 + len(kernel), 3 + 2 * len(kernel)))
    return np.ascontiguousarray(split.transpose(order).reshape(groups, batch * int(np.prod(space)), -1))
