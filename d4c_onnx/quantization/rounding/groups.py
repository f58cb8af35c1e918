"""Two levels of scales: groups of a channel's inputs share a small integer, the channel a float.

    w = scale[c] * m[c, g] * q[c, i],    q in [-8, 7],    m in 1 .. largest,    i in group g

The products m * q lie on the channel's int8 grid, so that int8 kernels multiply them. Scale and multipliers are chosen
together, by the weighted square error of rounding to nearest:

1. each group's own best scale, a float;
2. for a handful of channel scales, the multipliers nearest to those; the best one is kept;
3. each multiplier against its two neighbours, which may be better at the rounded scale;
4. a channel where all this is worse than a scale of its own (rounded once more, it may be) keeps that scale: all its
   multipliers are 8, and the scale an eighth, which is exact.

Source: QServe's progressive quantisation (Lin et al., arXiv 2405.04532), here with the integers chosen by error.
"""

import numpy as np

from d4c_onnx.quantization.plan import InputGroups
from d4c_onnx.quantization.rounding.base import grid_limits

_BITS = 4  # of the integers
_FRACTIONS = np.linspace(0.55, 1.15, 25)  # of max|w| of a group that may become its grid's top
_CHANNEL_FRACTIONS = np.linspace(0.8, 1.25, 10)  # of the channel's widest group that may become its largest multiplier
_EVEN = 8  # the multiplier of a channel that has one scale after all: a power of two, and at most `largest`
_CHUNK = 2**18  # elements handled at once, see `nearest`


def search_groups(
    weight: np.ndarray, groups: InputGroups, single: np.ndarray, importance: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray]:
    """The scales and multipliers of a weight on 4 bits.

    Args:
        weight: float32 [channels, inputs], inputs a multiple of the groups' size.
        groups: how many inputs share a multiplier, and how large it may be.
        single: float32 [channels], the scales without groups.
        importance: float [inputs], how much an input's error counts; none: all alike.

    Returns:
        float32 [channels] and uint8 [channels, inputs / size].
    """
    weight = np.asarray(weight, np.float32)
    counts = np.ones(weight.shape[1]) if importance is None else importance / max(float(importance.mean()), 1e-30)
    rows = max(1, _CHUNK // max(1, weight.shape[1]))
    starts = range(0, len(weight), rows)
    counts = counts.astype(np.float32)
    parts = [_search(weight[start : start + rows], groups, single[start : start + rows], counts) for start in starts]
    scales, multipliers = zip(*parts, strict=True)
    return np.concatenate(scales), np.concatenate(multipliers)


def spread(scale: np.ndarray, multipliers: np.ndarray, inputs: int) -> np.ndarray:
    """The step of every weight, float32 [channels, inputs]: the channel's scale times its group's multiplier."""
    steps = scale[:, None] * multipliers.astype(np.float32)
    return np.repeat(steps, inputs // multipliers.shape[1], axis=1)


def _search(
    weight: np.ndarray, groups: InputGroups, single: np.ndarray, counts: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """`search_groups` of a few channels."""
    parts = weight.reshape(len(weight), -1, groups.size)
    shares = counts.reshape(-1, groups.size)
    exact = single / np.float32(_EVEN) >= np.finfo(np.float32).tiny  # smaller ones round to zeros on a grid of ones
    eighth = np.where(exact, single / np.float32(_EVEN), np.float32(1))
    even = np.full((len(weight), len(shares)), _EVEN, np.float32)
    even, plain = _polish(parts, eighth, even, shares, groups.largest)
    scale, multipliers = _by_groups(parts, shares, groups.largest)
    multipliers, errors = _polish(parts, scale, multipliers, shares, groups.largest)
    worse = ~(errors.sum(1) < plain.sum(1))
    scale = np.where(worse, eighth, scale).astype(np.float32)
    return scale, np.where(worse[:, None], even, multipliers).astype(np.uint8)


def _by_groups(parts: np.ndarray, shares: np.ndarray, largest: int) -> tuple[np.ndarray, np.ndarray]:
    """The channel's scale, and the multipliers, that come nearest to each group's own scale."""
    wanted = _group_scales(parts, shares)
    top = np.maximum(wanted.max(1), 2 * largest * np.finfo(np.float32).tiny)
    scale, multipliers = top / np.float32(largest), np.full_like(wanted, largest)
    least = np.full(len(parts), np.inf)
    for fraction in _CHANNEL_FRACTIONS:
        tried = (top * np.float32(fraction / largest)).astype(np.float32)
        nearest = np.clip(np.rint(wanted / tried[:, None]), 1, largest)
        error = _errors(parts, tried[:, None] * nearest, shares).sum(1)
        better = error < least
        scale = np.where(better, tried, scale)
        multipliers = np.where(better[:, None], nearest, multipliers)
        least = np.where(better, error, least)
    return scale, multipliers


def _group_scales(parts: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """float32 [channels, groups]: the scale of least error of each group by itself."""
    high = grid_limits(_BITS)[1]
    largest = np.abs(parts).max(2)
    best, least = largest / np.float32(high), np.full(largest.shape, np.inf)
    for fraction in _FRACTIONS:
        tried = largest * np.float32(fraction / high)
        error = _errors(parts, np.maximum(tried, np.finfo(np.float32).tiny), shares)
        better = error < least
        best, least = np.where(better, tried, best), np.where(better, error, least)
    return best


def _polish(
    parts: np.ndarray, scale: np.ndarray, multipliers: np.ndarray, shares: np.ndarray, largest: int
) -> tuple[np.ndarray, np.ndarray]:
    """Each multiplier, or one of its neighbours where that is better; and the errors of the groups."""
    best, errors = multipliers, _errors(parts, scale[:, None] * multipliers, shares)
    for step in (-1, 1):
        tried = np.clip(multipliers + np.float32(step), 1, largest)
        error = _errors(parts, scale[:, None] * tried, shares)
        better = error < errors
        best, errors = np.where(better, tried, best), np.where(better, error, errors)
    return best, errors


def _errors(parts: np.ndarray, steps: np.ndarray, shares: np.ndarray) -> np.ndarray:
    """Weighted square error of every group, float [channels, groups], at one step [channels, groups] each."""
    low, high = grid_limits(_BITS)
    wide = steps[:, :, None]
    rounded = np.divide(parts, wide)
    np.rint(rounded, out=rounded)
    np.clip(rounded, low, high, out=rounded)
    rounded *= wide
    rounded -= parts
    np.square(rounded, out=rounded)
    return np.einsum("cgi,gi->cg", rounded, shares)
