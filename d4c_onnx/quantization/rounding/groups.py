"""Two levels of scales: groups of a channel's inputs share a multiplier of 4 bits, the channel a float.

    w[c, i] = scale[c] * level,    levels steps[m[c, g]] apart, i in group g (`graph.trellis`)

Scale and multipliers are chosen by the weighted square error of rounding to the nearest of the levels that every second
one is of: what the trellis gains beyond that is nearly the same share everywhere.

1. each group's own best step, a float;
2. for a handful of channel scales, the multipliers nearest to those; the best one is kept.

Source: two levels as in QServe's progressive quantisation (Lin et al., arXiv 2405.04532).
"""

import numpy as np

from d4c_onnx.graph.trellis import LARGEST, RATES, Rate

_FRACTIONS = np.linspace(0.55, 1.15, 25)  # of max|w| of a group that may become its outermost level
_CHANNEL_FRACTIONS = np.linspace(0.8, 1.25, 10)  # of the channel's widest step that may become its largest multiplier
_CHUNK = 2**18  # elements handled at once, see `nearest`
_TINY = np.finfo(np.float32).tiny


def search_groups(
    weight: np.ndarray, size: int, importance: np.ndarray | None = None, num_bits: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and multipliers of a weight in groups.

    Args:
        weight: float32 [channels, inputs], inputs a multiple of the size.
        size: inputs that share a multiplier.
        importance: float [inputs], how much an input's error counts; none: all alike.
        num_bits: of a code.

    Returns:
        float32 [channels] and uint8 [channels, inputs / size]; 0 where a group holds zeros only.
    """
    weight = np.asarray(weight, np.float32)
    counts = np.ones(weight.shape[1]) if importance is None else importance / max(float(importance.mean()), 1e-30)
    shares = counts.astype(np.float32).reshape(-1, size)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    starts = range(0, len(weight), rows)
    parts = [
        _search(weight[start : start + rows].reshape(-1, *shares.shape), shares, RATES[num_bits]) for start in starts
    ]
    scales, multipliers = zip(*parts, strict=True)
    return np.concatenate(scales), np.concatenate(multipliers)


def _search(parts: np.ndarray, shares: np.ndarray, rate: Rate) -> tuple[np.ndarray, np.ndarray]:
    """`search_groups` of a few channels, [channels, groups, size]."""
    steps, widest_step = rate.steps, np.float32(rate.steps[-1])
    wanted = _group_steps(parts, shares, rate)
    widest = wanted.max(1)
    # what is too small for a scale of normal float32 numbers is rounded to zeros on a grid of ones
    top = np.where(widest / widest_step < 2 * _TINY, widest_step, widest)
    wanted = np.where(top[:, None] > widest[:, None], 0, wanted)
    scale, multipliers = top / widest_step, np.where(wanted > 0, LARGEST, 0)
    least = np.full(len(parts), np.inf)
    for fraction in _CHANNEL_FRACTIONS:
        tried = (top * np.float32(fraction / steps[-1])).astype(np.float32)
        near = np.clip(np.rint(wanted / (tried[:, None] * np.float32(steps[1]))), 1, LARGEST).astype(np.int64)
        near[wanted == 0] = 0
        error = _errors(parts, tried[:, None] * steps[near].astype(np.float32), shares, rate).sum(1)
        better = error < least
        scale = np.where(better, tried, scale)
        multipliers = np.where(better[:, None], near, multipliers)
        least = np.where(better, error, least)
    return scale.astype(np.float32), multipliers.astype(np.uint8)


def _group_steps(parts: np.ndarray, shares: np.ndarray, rate: Rate) -> np.ndarray:
    """float32 [channels, groups]: the step of least error of each group by itself."""
    largest = np.abs(parts).max(2)
    best, least = largest * np.float32(2 / rate.last), np.full(largest.shape, np.inf)
    for fraction in _FRACTIONS:
        tried = largest * np.float32(2 * fraction / rate.last)
        error = _errors(parts, tried, shares, rate)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    return best


def _errors(parts: np.ndarray, steps: np.ndarray, shares: np.ndarray, rate: Rate) -> np.ndarray:
    """Weighted square error of every group, float [channels, groups], at one step [channels, groups] each."""
    wide = np.maximum(2 * steps, _TINY)[:, :, None]
    half = np.float32(rate.places - 0.5)  # codes lie evenly around zero: of 4 bits -7.5 .. 7.5 of two steps
    rounded = np.divide(parts, wide)
    rounded += half
    np.rint(rounded, out=rounded)
    np.clip(rounded, 0, 2 * half, out=rounded)
    rounded -= half
    rounded *= wide
    rounded -= parts
    np.square(rounded, out=rounded)
    return np.einsum("cgi,gi->cg", rounded, shares)
