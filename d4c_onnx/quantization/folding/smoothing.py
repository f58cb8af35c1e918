"""Smoothing: channels with outliers shrink into the weights that read them, exactly, where that helps.

A per-tensor activation grid must reach the largest channel; all others live on the few levels that are left. Moving a
scale s from the activation into the weights (`places` says where that is exact) evens the channels out:

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

alpha is searched by the output error *after* activation and weights were rounded, separately for every place; where no
alpha brings the error below the recipe's `smoothing_threshold`, nothing is changed. The threshold is strict because
calibration rows are synthetic: small gains on them need not carry over to real images, outliers gain far more.

Source: SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4); the search after rounding, and the places beyond the
LayerNorm, are ours.
"""

from dataclasses import dataclass

import numpy as np
import onnx
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import quant_params
from d4c_onnx.graph.index import GraphIndex
from d4c_onnx.graph.layers import channels_first
from d4c_onnx.quantization.deployment import target_of
from d4c_onnx.quantization.folding.places import Place, apply_scale, find_places
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rounding.base import grid_limits
from d4c_onnx.quantization.rounding.nearest import round_to_grid
from d4c_onnx.quantization.segments import SegmentedEncoder
from d4c_onnx.recipe import QuantizationSection

_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_ROWS = 512  # rows of the error search per place
# Where a row's grid may end, as a share of its maximum, when alphas are compared; the rounding searches it later. At 4
# bits a trained row wants to be clipped; one of equal weights, such as a random layer's, must not be.
_TOPS = {4: (0.75, 1.0), 6: (0.95,), 7: (1.0,), 8: (1.0,)}


@dataclass(slots=True)
class _Seen:
    """Per channel the extremes of an activation, float32 [width], and a sample of its rows."""

    low: np.ndarray
    high: np.ndarray
    rows: list[np.ndarray]


def smooth(
    model: onnx.ModelProto,
    plan: Plan,
    reader: CalibrationDataReader,
    section: QuantizationSection,
    *,
    provider: str = "cpu",
    threads: int = 0,
) -> dict[str, float]:
    """Smooth every place that gains by it, in place.

    Returns:
        The chosen alpha by the name of the node that makes the activation. The graph's node and value names may have
        changed: make the plan anew.
    """
    kinds = {"none": (), "layer_norm": ("layer_norm",)}.get(section.smoothing)
    places = [place for place in find_places(model.graph, plan.layers) if kinds is None or place.kind in kinds]
    if not places:
        return {}
    seen: dict[str, _Seen] = {}
    for batch in SegmentedEncoder(model, reader, provider, threads).advance([place.output for place in places]):
        for place in places:
            values = plan.observed(place.output, batch[place.output])
            _observe(seen, place.output, values.reshape(-1, values.shape[-1]))
    chosen = {}
    for place in places:
        alpha, scale = _search(model.graph, place, seen[place.output], plan, section)
        if alpha:
            apply_scale(model.graph, place, scale)
            chosen[place.node] = alpha
    return chosen


def _observe(seen: dict[str, _Seen], name: str, rows: np.ndarray) -> None:
    # a copy: a view would keep the whole batch in memory, all batches of all places together
    low, high, sample = rows.min(0), rows.max(0), rows[:: max(1, len(rows) // 16)].copy()
    known = seen.setdefault(name, _Seen(low, high, []))
    known.low, known.high = np.minimum(known.low, low), np.maximum(known.high, high)
    known.rows.append(sample)


def _search(
    graph: onnx.GraphProto, place: Place, seen: _Seen, plan: Plan, section: QuantizationSection
) -> tuple[float, np.ndarray]:
    index = GraphIndex(graph)
    weights = []
    for layer in place.consumers:
        values = index.constant(layer.weight)
        weights.append((channels_first(values, layer.channel_axis), plan.weight_bits[layer.weight]))
    rows = np.concatenate(seen.rows)
    rows = rows[:: max(1, len(rows) // _ROWS)]
    largest = np.maximum(np.abs(seen.low), np.abs(seen.high))
    peak = np.max([np.abs(weight).max(0) for weight, _ in weights], axis=0)
    none = np.ones_like(largest)
    best, least, winner = 0.0, section.smoothing_threshold * _error(rows, seen, weights, none, section), none
    for alpha in _ALPHAS:
        scale = np.maximum(largest, 1e-6) ** alpha / np.maximum(peak, 1e-6) ** (1 - alpha)
        scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
        error = _error(rows, seen, weights, scale, section)
        if error < least:
            best, least, winner = alpha, error, scale
    return best, winner


def _error(
    rows: np.ndarray,
    seen: _Seen,
    weights: list[tuple[np.ndarray, int]],
    scale: np.ndarray,
    section: QuantizationSection,
) -> float:
    """Square error of all consumers' outputs when activation and weights are rounded after smoothing by `scale`."""
    low, high = float((seen.low / scale).min()), float((seen.high / scale).max())
    ends = min(low, 0.0) * section.headroom, max(high, 0.0) * section.headroom
    params = quant_params(*ends, section.activation_bits, target_of(section).symmetric)
    integers = np.clip(np.rint(rows / scale / params.scale) + params.zero_point, 0, 2**params.num_bits - 1)
    rounded = ((integers - params.zero_point) * params.scale).astype(np.float32)
    total = 0.0
    for weight, bits in weights:
        grid = _on_grid(weight * scale, bits)
        total += float(np.square(rows @ weight.T - rounded @ grid.T).sum(dtype=np.float64))
    return total


def _on_grid(weight: np.ndarray, bits: int) -> np.ndarray:
    """Rows [channels, width] on the better one of few grids, float32."""
    best, least = weight, np.full(len(weight), np.inf, np.float32)
    for top in _TOPS[bits]:
        steps = np.maximum(np.abs(weight).max(1) * top / grid_limits(bits)[1], 1e-12).astype(np.float32)
        grid = round_to_grid(weight, steps, bits) * steps[:, None]
        error = np.square(grid - weight).sum(1)
        best, least = np.where((error < least)[:, None], grid, best), np.minimum(error, least)
    return best
