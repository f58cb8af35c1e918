"""Smoothing: channels with outliers shrink into the weights that read them, exactly, where that helps.

A per-tensor activation grid must reach the largest channel; all others live on the few levels that are left. Moving a
scale s from the activation into the weights (`mappings` says where that is exact) evens the channels out:

    s_j = max|x_j|^alpha / max|W_j|^(1 - alpha)

alpha is searched by the output error *after* activation and weights were rounded, separately for every place; where no
alpha brings the error below a fifth of what it was, nothing is changed. The threshold is strict because
calibration rows are synthetic: small gains on them need not carry over to real images, outliers gain far more.

Source: SmoothQuant (Xiao et al., arXiv 2211.10438, equation 4); the search after rounding, and the places beyond the
LayerNorm, are ours.
"""

from collections.abc import Iterable
from dataclasses import dataclass

import numpy as np
import onnx_ir as ir
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.observers import quant_params
from d4c_onnx.graph.attention import values_mixed
from d4c_onnx.graph.layers import channels_first
from d4c_onnx.graph.values import constant, name_of, value_named
from d4c_onnx.quantization.inside.segments import SegmentedEncoder
from d4c_onnx.quantization.plan import Plan
from d4c_onnx.quantization.rewrites.mappings import SmoothingMapping, apply_scale, find_mappings
from d4c_onnx.quantization.rounding.base import WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.nearest import round_to_grid
from d4c_onnx.recipe import QuantizationConfig

_ALPHAS = (0.25, 0.5, 0.75, 1.0)
_ROWS = 512  # rows of the error search per mapping
# What of the error after rounding may remain where a mapping is smoothed. Smaller gains on synthetic rows do not carry
# over: at 0.5 half of a really trained ViT-S was smoothed, and its W8A8 embeddings were three times further from FP32
# than without; outliers gain far more (docs/fidelity.md).
_THRESHOLD = 0.2
# Where a row's grid may end, as a share of its maximum, when alphas are compared; the rounding searches it later. At 4
# bits a trained row wants to be clipped; one of equal weights, such as a random layer's, must not be.
_TOPS = {4: (0.75, 1.0), 6: (0.95,), 8: (1.0,)}


@dataclass(slots=True)
class _Seen:
    """Per channel the extremes of an activation, float32 [width], and a sample of its rows."""

    low: np.ndarray
    high: np.ndarray
    rows: list[np.ndarray]


def smooth(
    model: ir.Model,
    plan: Plan,
    reader: CalibrationDataReader,
    config: QuantizationConfig,
    *,
    symmetric: bool = False,
    provider: str = "cpu",
    threads: int = 0,
) -> dict[str, float]:
    """Smooth every mapping that gains by it, in place.

    Args:
        symmetric: whether activations have zero point 0 in the middle of their grid.

    Returns:
        The chosen alpha by the name of the node that makes the activation. The graph's node and value names may have
        changed: make the plan anew.
    """
    kinds = {"none": (), "layer_norm": ("layer_norm",)}.get(config.smoothing)
    found = [entry for entry in find_mappings(model.graph, plan.layers) if kinds is None or entry.kind in kinds]
    if not found:
        return {}
    seen = _look(model, plan, reader, found, provider, threads)
    chosen = {}
    for mapping in found:
        search = _Search(model.graph, mapping, seen[name_of(mapping.output)], plan, config, symmetric)
        alpha, scale = search.run()
        if alpha:
            apply_scale(model.graph, mapping, scale)
            chosen[mapping.node.name or ""] = alpha
    return chosen


def _look(
    model: ir.Model,
    plan: Plan,
    reader: CalibrationDataReader,
    mappings: Iterable[SmoothingMapping],
    provider: str,
    threads: int,
) -> dict[str, _Seen]:
    seen: dict[str, _Seen] = {}
    names = [name_of(mapping.output) for mapping in mappings]
    mixed = values_mixed(model.graph)  # what could pass through an attention on other images: see `inside.ranges`
    sources = {name: (name, mixed[name]) if name in mixed else (name,) for name in names}
    wanted = [source for every in sources.values() for source in every]
    for batch in SegmentedEncoder(model, reader, provider, threads).advance(wanted):
        for name, source in ((name, source) for name, every in sources.items() for source in every):
            values = plan.observed(name, batch[source])
            _observe(seen, name, values.reshape(-1, values.shape[-1]))
    return seen


def _observe(seen: dict[str, _Seen], name: str, rows: np.ndarray) -> None:
    # a copy: a view would keep the whole batch in memory, all batches of all mappings together
    low, high, sample = rows.min(0), rows.max(0), rows[:: max(1, len(rows) // 16)].copy()
    known = seen.setdefault(name, _Seen(low, high, []))
    known.low, known.high = np.minimum(known.low, low), np.maximum(known.high, high)
    known.rows.append(sample)


class _Search:
    """The search for one mapping's alpha."""

    def __init__(
        self,
        graph: ir.Graph,
        mapping: SmoothingMapping,
        seen: _Seen,
        plan: Plan,
        config: QuantizationConfig,
        symmetric: bool,
    ) -> None:
        self._seen, self._symmetric = seen, symmetric
        self._bits, self._headroom = config.activation_bits, config.headroom
        self._weights = [
            (
                channels_first(constant(value_named(graph, layer.weight)), layer.channel_axis),
                _like(plan.weight_bits[layer.weight]),
            )
            for layer in mapping.consumers
        ]
        rows = np.concatenate(seen.rows)
        self._rows = rows[:: max(1, len(rows) // _ROWS)]

    def run(self) -> tuple[float, np.ndarray]:
        """The best alpha, 0 where none passes the threshold, and its scale, float32 [width]."""
        largest = np.maximum(np.abs(self._seen.low), np.abs(self._seen.high))
        peak = np.max([np.abs(weight).max(0) for weight, _ in self._weights], axis=0)
        none = np.ones_like(largest)
        best, least, winner = 0.0, _THRESHOLD * self._error(none), none
        for alpha in _ALPHAS:
            scale = np.maximum(largest, 1e-6) ** alpha / np.maximum(peak, 1e-6) ** (1 - alpha)
            scale = (scale / np.exp(np.log(scale).mean())).astype(np.float32)
            error = self._error(scale)
            if error < least:
                best, least, winner = alpha, error, scale
        return best, winner

    def _error(self, scale: np.ndarray) -> float:
        """Square error of all consumers' outputs when activation and weights are rounded after smoothing by `scale`."""
        low, high = float((self._seen.low / scale).min()), float((self._seen.high / scale).max())
        ends = min(low, 0.0) * self._headroom, max(high, 0.0) * self._headroom
        params = quant_params(*ends, self._bits, self._symmetric)
        rounded = params.round(self._rows / scale).astype(np.float32)
        total = 0.0
        for weight, bits in self._weights:
            grid = _on_grid(weight * scale, bits)
            total += float(np.square(self._rows @ weight.T - rounded @ grid.T).sum(dtype=np.float64))
        return total


def _like(bits: int) -> int:
    """The width that stands for a grid's: outliers are as large to groups of 3 or 5 bits as to 4."""
    return 4 if bits <= 5 else bits


def _on_grid(weight: np.ndarray, bits: int) -> np.ndarray:
    """Rows [channels, width] on the better one of few grids, float32."""
    best, least = weight, np.full(len(weight), np.inf, np.float32)
    for top in _TOPS[bits]:
        steps = np.maximum(np.abs(weight).max(1) * top / grid_limits(bits)[1], 1e-12).astype(np.float32)
        grid = round_to_grid(weight, steps, WeightGrid(bits)) * steps[:, None]
        error = np.square(grid - weight).sum(1)
        best, least = np.where((error < least)[:, None], grid, best), np.minimum(error, least)
    return best
