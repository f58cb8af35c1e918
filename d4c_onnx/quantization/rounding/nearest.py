"""Round to nearest, with per-channel scales of least square error."""

import numpy as np

from d4c_onnx.quantization.rounding.base import InputMoments, QuantizedWeight, WeightGrid, grid_limits
from d4c_onnx.quantization.rounding.groups import search_groups
from d4c_onnx.quantization.rounding.pairs import fit_pairs
from d4c_onnx.quantization.rounding.trellis_search import trace_nearest

# Fractions of max|w| that may become the grid's top. Above 1 the grid's lone lowest level (-8 beside +7) pays off.
_FRACTIONS = {
    4: np.linspace(0.5, 1.15, 66),
    6: np.linspace(0.7, 1.04, 35),
    7: np.linspace(0.8, 1.02, 23),
    8: np.linspace(0.85, 1.0, 16),
}
# Pairs want a channel's largest weight further from the grid's top, up to half of it, where none needs to give way.
_PAIRED_FRACTIONS = np.linspace(0.9, 2.0, 23)
_CHUNK = 2**18  # elements handled at once: they stay in a core's cache through all fractions, twice as fast


class NearestRounding:
    """Nearest integer under the scale of least square error."""

    uses_data = False
    sequential = False

    def round(
        self,
        weight: np.ndarray,
        grid: WeightGrid,
        moments: InputMoments | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedWeight:
        """See `LayerRounding.round`."""
        if grid.group_size:
            scale, multipliers = search_groups(weight, grid.group_size, num_bits=grid.num_bits)
            path = trace_nearest(weight, scale, multipliers, grid.num_bits)
            return QuantizedWeight.on_path(*path, scale, grid.num_bits)
        scale = search_scales(weight, grid)
        return QuantizedWeight(round_to_grid(weight, scale, grid), scale, grid.num_bits)


def round_to_grid(weight: np.ndarray, scale: np.ndarray, grid: WeightGrid) -> np.ndarray:
    """int8 [channels, inputs]: nearest integers (ties to even), clipped to the grid, in pairs that fit.

    Args:
        scale: float32 [channels].
    """
    rounded = np.empty(weight.shape, np.int8)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))  # a token table's floats would take gigabytes
    for start in range(0, len(weight), rows):
        part = weight[start : start + rows] / scale[start : start + rows, None]
        rounded[start : start + rows] = np.clip(np.rint(part), *grid_limits(grid.num_bits))
    if grid.partners is not None:
        fit_pairs(rounded, grid.partners)
    return rounded


def search_scales(weight: np.ndarray, grid: WeightGrid, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [channels]: per channel, the scale whose nearest rounding has the least square error.

    Args:
        weight: float32 [channels, inputs].
        grid: without groups.
        importance: float [inputs], how much an input's error counts (its mean square); none: all alike.

    Source: the MSE search of arXiv 2511.15411's code, symmetric here because onnxruntime's CPU kernels need one zero
    point for all channels.
    """
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = [_search(weight[start : start + rows], grid, importance) for start in range(0, len(weight), rows)]
    return np.concatenate(parts) if parts else np.ones(0, np.float32)


def _search(weight: np.ndarray, grid: WeightGrid, importance: np.ndarray | None) -> np.ndarray:
    low, high = grid_limits(grid.num_bits)
    weight = np.asarray(weight, np.float32)
    largest = np.abs(weight).max(1)
    # An all-zero channel, or one too small for a normal float32 scale, gets a harmless unit grid: it rounds to zeros.
    largest = np.where(largest / high < np.finfo(np.float32).tiny, np.float32(high), largest)
    best = largest / np.float32(high)
    least = np.full(len(weight), np.inf)
    counts = np.ones(weight.shape[1]) if importance is None else importance / max(float(importance.mean()), 1e-30)
    scaled = np.empty_like(weight)
    for fraction in _FRACTIONS[grid.num_bits] if grid.partners is None else _PAIRED_FRACTIONS:
        scale = (largest * np.float32(fraction / high)).astype(np.float32)
        np.divide(weight, scale[:, None], out=scaled)
        np.rint(scaled, out=scaled)
        np.clip(scaled, low, high, out=scaled)
        if grid.partners is not None:
            fit_pairs(scaled, grid.partners)
        scaled *= scale[:, None]
        scaled -= weight
        np.square(scaled, out=scaled)
        error = scaled @ counts
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(np.float32)
