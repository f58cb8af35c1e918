"""One shared smoothing scale per LayerNorm over all its consumers: an exact rewrite of the float encoder.

A LayerNorm gives x = g z + b (element by element), and every consumer multiplies it with a weight: y_i = W_i x. For any
positive vector s,

    y_i = (W_i diag(s)) (g / s z + b / s),

so dividing g and b by s and multiplying the weights' columns by s changes nothing in float. It changes everything for
a per-tensor activation grid: channels with outliers shrink to the size of the others. q, k and v read one LayerNorm,
so they share one s.

s_j = max|x_j|^alpha / max|W_j|^(1 - alpha), and alpha is searched by the output error *after* both were rounded; where
no alpha helps by five percent, nothing is changed.

Source: SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4); the search after rounding is ours.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import quant_params
from d4c_onnx.graph.index import GraphIndex, set_initializer
from d4c_onnx.graph.layers import WeightedLayer, channels_back, channels_first
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import grid_limits
from d4c_onnx.quantization.rounding.nearest import round_to_grid
from d4c_onnx.quantization.segments import SegmentedEncoder
from d4c_onnx.recipe import QuantizationSection

_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_GAIN = 0.95  # an alpha must beat doing nothing by this much: the calibration rows are a sample
_ROWS = 512  # rows of the error search per LayerNorm
# Where a weight's grid ends, as a share of its maximum, when alphas are compared; the rounding searches it later.
_TOP = {4: 0.75, 6: 0.95, 8: 1.0}


@dataclass(frozen=True, slots=True)
class Smoothable:
    """A LayerNorm whose output feeds weighted layers only."""

    node: str
    output: str
    scale: str
    bias: str | None
    consumers: tuple[WeightedLayer, ...]


def find_smoothable(graph: onnx.GraphProto, layers: tuple[WeightedLayer, ...]) -> list[Smoothable]:
    """LayerNorms that can be smoothed exactly.

    Left out: an output that something else than a weighted layer reads (or the graph gives out), and a scale, bias or
    weight that several nodes share.
    """
    index = GraphIndex(graph)
    by_node = {layer.node: layer for layer in layers}
    found = []
    for node in graph.node:
        if node.op_type != "LayerNormalization" or node.output[0] in index.outputs:
            continue
        readers = index.consumers.get(node.output[0], [])
        consumers = [by_node[reader.name] for reader in readers if reader.name in by_node]
        parameters = [name for name in node.input[1:] if name]
        owned = [*parameters, *(layer.weight for layer in consumers)]
        exact = (
            len(consumers) == len(readers) > 0
            and all(layer.data == node.output[0] and layer.op != "Conv" for layer in consumers)
            and all(name in index.initializers and len(index.consumers[name]) == 1 for name in owned)
            and len(index.initializers[parameters[0]].dims) == 1
        )
        if exact:
            bias = parameters[1] if len(parameters) > 1 else None
            found.append(Smoothable(node.name, node.output[0], parameters[0], bias, tuple(consumers)))
    return found


def smooth_layer_norms(
    model: onnx.ModelProto,
    plan: Plan,
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    provider: str = "cpu",
    threads: int = 0,
) -> dict[str, float]:
    """Smooth every LayerNorm that gains by it, in place; returns the chosen alpha per LayerNorm."""
    places = find_smoothable(model.graph, plan.layers)
    if not places:
        return {}
    largest: dict[str, np.ndarray] = {}
    sampled: dict[str, list[np.ndarray]] = {place.output: [] for place in places}
    for batch in SegmentedEncoder(model, reader, provider, threads).advance([place.output for place in places]):
        for place in places:
            rows = batch[place.output].reshape(-1, batch[place.output].shape[-1])
            peak = np.abs(rows).max(0)
            largest[place.output] = np.maximum(largest.get(place.output, peak), peak)
            sampled[place.output].append(rows[:: max(1, len(rows) // 16)])
    chosen = {}
    for place in places:
        rows = np.concatenate(sampled[place.output])
        rows = rows[:: max(1, len(rows) // _ROWS)]
        alpha, scale = _search(model.graph, place, rows, largest[place.output], plan, section)
        if alpha:
            apply_smoothing(model.graph, place, scale)
            chosen[place.node] = alpha
    return chosen


def apply_smoothing(graph: onnx.GraphProto, place: Smoothable, scale: np.ndarray) -> None:
    """Divide the LayerNorm's parameters by `scale`, float32 [width], and multiply its consumers' columns by it."""
    index = GraphIndex(graph)
    for name in (place.scale, place.bias):
        values = index.array(name) if name else None
        if name and values is not None:
            set_initializer(graph, name, (values / scale).astype(np.float32))
    for layer in place.consumers:
        weight = index.array(layer.weight)
        assert weight is not None
        rows = channels_first(weight, layer.channel_axis) * scale
        set_initializer(graph, layer.weight, channels_back(rows.astype(np.float32), weight.shape, layer.channel_axis))


def _search(
    graph: onnx.GraphProto,
    place: Smoothable,
    rows: np.ndarray,
    largest: np.ndarray,
    plan: Plan,
    section: QuantizationSection,
) -> tuple[float, np.ndarray]:
    index = GraphIndex(graph)
    weights = []
    for layer in place.consumers:
        values = index.array(layer.weight)
        assert values is not None
        weights.append((channels_first(values, layer.channel_axis), plan.weight_bits[layer.weight]))
    peak = np.max([np.abs(weight).max(0) for weight, _ in weights], axis=0)
    none = np.ones_like(largest)
    best, least, winner = 0.0, _GAIN * _error(rows, largest, weights, none, section), none
    for alpha in _ALPHAS:
        scale = np.maximum(largest, 1e-6) ** alpha / np.maximum(peak, 1e-6) ** (1 - alpha)
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        error = _error(rows, largest, weights, scale, section)
        if error < least:
            best, least, winner = alpha, error, scale
    return best, winner


def _error(
    rows: np.ndarray,
    largest: np.ndarray,
    weights: list[tuple[np.ndarray, int]],
    scale: np.ndarray,
    section: QuantizationSection,
) -> float:
    """Square error of all consumers' outputs when activation and weights are rounded after smoothing by `scale`."""
    reach = float((largest / scale).max()) * section.headroom
    low = -reach if float(rows.min()) < 0 else 0.0
    params = quant_params(low, reach, section.activation_bits)
    integers = np.clip(np.rint(rows / scale / params.scale) + params.zero_point, 0, 2**params.num_bits - 1)
    rounded = ((integers - params.zero_point) * params.scale).astype(np.float32)
    total = 0.0
    for weight, bits in weights:
        folded = weight * scale
        steps = np.maximum(np.abs(folded).max(1) * _TOP[bits] / grid_limits(bits)[1], 1e-12).astype(np.float32)
        grid = round_to_grid(folded, steps, bits) * steps[:, None]
        total += float(np.square(rows @ weight.T - rounded @ grid.T).sum(dtype=np.float64))
    return total
