"""Second-order statistics of what reaches each weighted layer: what a learned rounding needs to know of the data.

For a layer y = W x + b, x is the input in the float encoder and x^ the input as the quantised encoder delivers it:
rounded to its grid and, in the sequential mode, carrying the errors of all layers before. Only sums are kept, so
memory does not grow with the number of samples.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import QuantParams
from d4c_onnx.graph.layers import WeightedLayer
from d4c_onnx.graph.values import dims, name_of, node, nodes_by_name, prepend, replace_input, set_constant
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.inside.views import InputView, input_view
from d4c_onnx.quantization.plan import Plan


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
        model: ir.Model,
        plan: Plan,
        ranges: Mapping[str, QuantParams],
        reader: CalibrationDataReader,
        provider: str = "cpu",
        threads: int = 0,
    ) -> None:
        self._plan, self._ranges = plan, ranges
        self._nodes = nodes_by_name(model.graph)
        self._shapes = {layer.weight: dims(model.graph.initializers[layer.weight]) or () for layer in plan.layers}
        self._plain = SegmentedEncoder(model, reader, provider, threads)
        self._twin = SegmentedEncoder(fake_quantize(model, plan, ranges), reader, provider, threads)

    def replace(self, name: str, values: np.ndarray) -> None:
        """Give the twin an initialiser's new float values."""
        self._twin.replace(name, values)

    def collect(self, layers: Sequence[WeightedLayer]) -> dict[str, InputStatistics]:
        """Statistics by layer name, over all samples. Layers that see the same rows share one object.

        Calls go through the graph in order: a layer that an earlier call has passed cannot be asked for again.
        """
        views = {layer.node: self._view(layer) for layer in layers}
        found: dict[InputView, InputStatistics] = {}
        names = list(dict.fromkeys(layer.data for layer in layers))
        rounded_name = {name: quantized_name(name) if name in self._ranges else name for name in names}
        exact, rounded = self._plain.advance(names), self._twin.advance(list(rounded_name.values()))
        for plain, twin in zip(exact, rounded, strict=True):
            for view in dict.fromkeys(views.values()):
                rows = view.rows(self._plan.observed(view.data, plain[view.data]))
                quantized = view.rows(self._plan.observed(view.data, twin[rounded_name[view.data]]))
                if view not in found:
                    found[view] = new_statistics(rows.shape[0], rows.shape[2])
                found[view].add(rows, quantized)
        for statistics in found.values():
            statistics.flush()
        return {name: found[view] for name, view in views.items()}

    def _view(self, layer: WeightedLayer) -> InputView:
        return input_view(self._nodes[layer.node], self._shapes[layer.weight], layer.data)


def quantized_name(name: str) -> str:
    """The value that carries an activation after its QuantizeLinear / DequantizeLinear pair in the twin."""
    return f"{name}_fake_quantized"


def fake_quantize(model: ir.Model, plan: Plan, ranges: Mapping[str, QuantParams]) -> ir.Model:
    """The float graph with every quantised activation rounded to its grid before the nodes of the plan.

    The twin shares the float model's weights.
    """
    twin = model.clone()
    graph = twin.graph
    nodes = nodes_by_name(graph)
    chosen = [nodes[name] for name in plan.nodes]
    used = dict.fromkeys(
        value for entry in chosen for value in entry.inputs if value is not None and name_of(value) in ranges
    )
    for value in used:
        pair = _rounding(graph, value, ranges[name_of(value)])
        for entry in chosen:
            replace_input(entry, value, pair[-1].outputs[0])
        made = value.producer()
        if made is None:
            prepend(graph, pair)
        else:  # each pair right after the node it rounds: the order of the float graph stays
            graph.insert_after(made, pair)
    return twin


def _rounding(graph: ir.Graph, value: ir.Value, params: QuantParams) -> list[ir.Node]:
    """One activation on its grid: in one term, or in two."""
    name = name_of(value)
    if not params.two_terms:
        return _term(graph, value, params, f"{name}_fq", quantized_name(name))
    first = _term(graph, value, params, f"{name}_fq", f"{name}_fq_first")
    left = node("Sub", [value, first[-1].outputs[0]], f"{name}_fq_left")
    second = _term(graph, left.outputs[0], params.remainder, f"{name}_fq_second", f"{name}_fq_remainder")
    both = node("Add", [first[-1].outputs[0], second[-1].outputs[0]], quantized_name(name))
    return [*first, left, *second, both]


def _term(graph: ir.Graph, value: ir.Value, params: QuantParams, name: str, output: str) -> list[ir.Node]:
    """Clip, QuantizeLinear and DequantizeLinear."""

    def grid(part: str, number: float, dtype: type[np.generic]) -> ir.Value:
        return set_constant(graph, f"{name}_{part}", np.array(number, dtype))

    low, high = (grid(part, end, np.float32) for part, end in zip(("low", "high"), params.range, strict=True))
    scale, zero = grid("scale", params.scale, np.float32), grid("zero_point", params.zero_point, np.uint8)
    clip = node("Clip", [value, low, high], f"{name}_clip")
    quantize = node("QuantizeLinear", [clip.outputs[0], scale, zero], f"{name}_integer")
    return [clip, quantize, node("DequantizeLinear", [quantize.outputs[0], scale, zero], output)]
