"""Round to nearest, with per-channel scales of least square error."""

import numpy as np

from d4c_onnx.quantization.plan import InputGroups
from d4c_onnx.quantization.rounding.base import InputMoments, QuantizedWeight, grid_limits
from d4c_onnx.quantization.rounding.groups import search_groups, spread

# Fractions of max|w| that may become the grid's top. Above 1 the grid's lone lowest level (-8 beside +7) pays off.
_FRACTIONS = {
    4: np.linspace(0.5, 1.15, 66),
    6: np.linspace(0.7, 1.04, 35),
    7: np.linspace(0.8, 1.02, 23),
    8: np.linspace(0.85, 1.0, 16),
}
_CHUNK = 2**18  # elements handled at once: they stay in a core's cache through all fractions, twice as fast


class NearestRounding:
    """Nearest integer under the scale of least square error."""

    uses_data = False
    sequential = False

    def round(
        self,
        weight: np.ndarray,
        num_bits: int,
        moments: InputMoments | None = None,
        groups: InputGroups | None = None,
        outputs: np.ndarray | None = None,
    ) -> QuantizedWeight:
        """See `LayerRounding.round`."""
        if groups is not None:
            scale, multipliers = search_groups(weight, groups, search_scales(weight, num_bits))
            steps = spread(scale, multipliers, weight.shape[1])
            return QuantizedWeight(round_to_grid(weight, steps, num_bits), scale, num_bits, multipliers)
        scale = search_scales(weight, num_bits)
        return QuantizedWeight(round_to_grid(weight, scale, num_bits), scale, num_bits)


def round_to_grid(weight: np.ndarray, scale: np.ndarray, num_bits: int) -> np.ndarray:
    """int8 [channels, inputs]: nearest integers (ties to even), clipped to the grid.

    Args:
        scale: float32 [channels], or one for each weight, [channels, inputs].
    """
    low, high = grid_limits(num_bits)
    steps = scale if scale.ndim == 2 else scale[:, None]  # there may be no channels
    return np.clip(np.rint(weight / steps), low, high).astype(np.int8)


def search_scales(weight: np.ndarray, num_bits: int, importance: np.ndarray | None = None) -> np.ndarray:
    """float32 [channels]: per channel, the scale whose nearest rounding has the least square error.

    Args:
        weight: float32 [channels, inputs].
        num_bits: 4, 6, 7 or 8.
        importance: float [inputs], how much an input's error counts (its mean square); none: all alike.

    Source: the MSE search of arXiv 2511.15411's code, symmetric here because onnxruntime's CPU kernels need one zero
    point for all channels.
    """
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    parts = [_search(weight[start : start + rows], num_bits, importance) for start in range(0, len(weight), rows)]
    return np.concatenate(parts) if parts else np.ones(0, np.float32)


def _search(weight: np.ndarray, num_bits: int, importance: np.ndarray | None) -> np.ndarray:
    low, high = grid_limits(num_bits)
    weight = np.asarray(weight, np.float32)
    largest = np.abs(weight).max(1)
    # An all-zero channel, or one too small for a normal float32 scale, gets a harmless unit grid: it rounds to zeros.
    largest = np.where(largest / high < np.finfo(np.float32).tiny, np.float32(high), largest)
    best = largest / np.float32(high)
    least = np.full(len(weight), np.inf)
    counts = np.ones(weight.shape[1]) if importance is None else importance / max(float(importance.mean()), 1e-30)
    scaled = np.empty_like(weight)
    for fraction in _FRACTIONS[num_bits]:
        scale = (largest * np.float32(fraction / high)).astype(np.float32)
        np.divide(weight, scale[:, None], out=scaled)
        np.rint(scaled, out=scaled)
        np.clip(scaled, low, high, out=scaled)
        scaled *= scale[:, None]
        scaled -= weight
        np.square(scaled, out=scaled)
        error = scaled @ counts
        better = error < least
        best, least = np.where(better, scale, best), np.where(better, error, least)
    return best.astype(np.float32)
