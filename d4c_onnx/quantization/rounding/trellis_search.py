"""The best path through a trellis, with GPTQ's repair on the way.

Each of the four states keeps the best path that ends there, and what that path's errors do to the inputs that are still
open: the repair of GPTQ happens within a path, not after it. At the beginning of a group every state tries a few
multipliers; at its end each state keeps the best.

Source: per-survivor processing (Raheli, Polydoros and Tzou, 1995) in a Viterbi search; the trellis is that of
`graph.trellis`.
"""

import numpy as np

from d4c_onnx.graph.trellis import COSETS, LARGEST, RATES, Rate

_TRIES = (-1, 0, 1)  # around a group's own best multiplier
_BLOCK = 64  # inputs after which the best path so far is taken
_ROWS = 128  # of channels at once

_COSET = COSETS.astype(np.float64)[..., None]


def trace(
    target: np.ndarray, factor: np.ndarray | None, near: np.ndarray, num_bits: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """Codes and multipliers of least repaired error.

    Args:
        target: float64 [channels, inputs], in units of the int8 grid.
        factor: float64 [inputs, inputs], upper Cholesky factor of the inverse Gram, in the inputs' own order; None: no
            input repairs another.
        near: uint8 [channels, groups], multipliers to try, with their neighbours.
        num_bits: of a code.

    Returns:
        uint8 [channels, inputs] and uint8 [channels, groups].
    """
    parts = [
        _trace(target[start : start + _ROWS], factor, near[start : start + _ROWS], RATES[num_bits])
        for start in range(0, len(target), _ROWS)
    ]
    codes, multipliers = zip(*parts, strict=True)
    return np.concatenate(codes), np.concatenate(multipliers)


def trace_nearest(
    weight: np.ndarray, scale: np.ndarray, near: np.ndarray, num_bits: int = 4
) -> tuple[np.ndarray, np.ndarray]:
    """`trace` where no input repairs another.

    Args:
        weight: float32 [channels, inputs].
        scale: float32 [channels].
        near: uint8 [channels, groups].
        num_bits: of a code.
    """
    return trace(weight.astype(np.float64) / scale[:, None], None, near, num_bits)


def _trace(
    target: np.ndarray, factor: np.ndarray | None, near: np.ndarray, rate: Rate
) -> tuple[np.ndarray, np.ndarray]:
    rows, inputs = target.shape
    size = inputs // near.shape[1]
    open_ = np.ascontiguousarray(target.T)  # [inputs, channels]
    codes, multipliers = np.empty((inputs, rows), np.uint8), np.empty((near.shape[1], rows), np.uint8)
    state = np.zeros((2, rows), np.intp)  # older and newer bit of the path so far
    width = max(size, _BLOCK // size * size)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        own = None if factor is None else factor[start:stop, start:stop]
        found, errors, chosen = _block(open_[start:stop], own, near[:, start // size : stop // size], state, rate)
        codes[start:stop], multipliers[start // size : stop // size] = found, chosen
        state = np.stack([found[-2] & 1, found[-1] & 1]).astype(np.intp)
        if factor is not None:
            open_[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(multipliers.T)


def _block(
    target: np.ndarray, factor: np.ndarray | None, near: np.ndarray, state: np.ndarray, rate: Rate
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Codes [inputs, channels], errors over pivots [inputs, channels], multipliers [groups, channels]."""
    inputs, rows = target.shape
    size = inputs // near.shape[1]
    cost = np.full((2, 2, rows), np.inf)
    cost[state[0], state[1], np.arange(rows)] = 0
    open_ = np.repeat(target[:, None, None], 2, 1).repeat(2, 2)  # [inputs, 2, 2, rows]
    codes = np.zeros((inputs, 2, 2, rows), np.uint8)
    errors = np.zeros((inputs, 2, 2, rows))
    multipliers = np.zeros((near.shape[1], 2, 2, rows), np.uint8)
    each = np.arange(rows)
    for group in range(near.shape[1]):
        start, stop = group * size, (group + 1) * size
        tried = np.stack([np.clip(near[:, group].astype(np.int64) + step, 0, LARGEST) for step in _TRIES])
        own = None if factor is None else factor[start:stop, start:stop]
        cost, origin, found, lost, best = _group(open_[start:stop], own, cost, tried, rate)
        older, newer = origin >> 1, origin & 1
        for kept in (open_, codes, errors, multipliers):
            kept[:] = kept[:, older, newer, each]
        codes[start:stop], errors[start:stop] = found, lost
        multipliers[group] = tried[best, each]
        if factor is not None and stop < inputs:
            repair = factor[start:stop, stop:].T @ lost.reshape(size, -1)
            open_[stop:] -= repair.reshape(-1, 2, 2, rows)
    older, newer = np.divmod(cost.reshape(4, rows).argmin(0), 2)
    return codes[:, older, newer, each], errors[:, older, newer, each], multipliers[:, older, newer, each]


def _group(
    target: np.ndarray, factor: np.ndarray | None, cost: np.ndarray, tried: np.ndarray, rate: Rate
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One group, all multipliers that are tried.

    Returns:
        By end state [2, 2, channels]: cost, state at the beginning, codes and errors [size, ...], which try was best.
    """
    size, _, _, rows = target.shape
    tries = len(tried)
    steps = rate.steps[tried].reshape(-1)  # [tries * rows]
    inverse = np.where(steps > 0, 0.25 / np.where(steps > 0, steps, 1), 0)
    total = np.tile(cost, tries)  # [2, 2, tries * rows]
    pending = np.tile(target, tries)
    shift, base = (rate.last / 2 - _COSET) / 4, _COSET - rate.last / 2
    walked = []
    for column in range(size):
        wanted = pending[column]
        place = wanted * inverse + shift  # [bit, older, newer, ...]
        np.rint(place, out=place)
        np.clip(place, 0, rate.places - 1, out=place)
        level = place * 4
        level += base
        level *= steps
        np.rint(level, out=level)
        error = wanted - level
        if factor is not None:
            error *= 1 / factor[column, column]
        reached = error * error
        reached += total
        second = reached[:, 1] < reached[:, 0]  # [bit, newer, ...]: the older bit was 1
        second = second.swapaxes(0, 1)  # [newer, bit, ...], as the next state's bits
        place, error, reached = (
            np.where(second, part[:, 1].swapaxes(0, 1), part[:, 0].swapaxes(0, 1)) for part in (place, error, reached)
        )
        total = reached
        walked.append((second, place, error))
        if column + 1 < size:
            rest = pending[column + 1 :]
            rest = np.where(second, rest[:, 1][:, :, None], rest[:, 0][:, :, None])
            if factor is not None:
                rest -= factor[column, column + 1 :, None, None, None] * error
            pending[column + 1 :] = rest
    total = total.reshape(2, 2, tries, rows)
    best = total.argmin(2)
    ends = np.take_along_axis(total, best[:, :, None], 2)[:, :, 0]
    older, newer = (
        np.broadcast_to(np.array(bits)[..., None], best.shape) for bits in ([[0, 0], [1, 1]], [[0, 1], [0, 1]])
    )
    where = best * rows + np.arange(rows)
    codes, errors = np.empty((size, 2, 2, rows), np.uint8), np.empty((size, 2, 2, rows))
    for column in reversed(range(size)):
        second, place, error = walked[column]
        codes[column] = 2 * place[older, newer, where].astype(np.uint8) + newer.astype(np.uint8)
        errors[column] = error[older, newer, where]
        older, newer = second[older, newer, where].astype(np.intp), older
    return ends, 2 * older + newer, codes, errors, best
