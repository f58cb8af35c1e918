"""The best path through a trellis, with GPTQ's repair on the way.

Each of the four states keeps the best path that ends there, and what that path's errors do to the inputs that are still
open: the repair of GPTQ happens within a path, not after it. At the beginning of a group every state tries a few
multipliers; at its end each state keeps the best.

Source: per-survivor processing (Raheli, Polydoros and Tzou, 1995) in a Viterbi search; the trellis is that of
`graph.trellis`.
"""

from typing import NamedTuple

import numpy as np

from d4c_onnx.graph.trellis import COSETS, LARGEST, RATES, Rate

_TRIES = (-1, 0, 1)  # around a group's own best multiplier
_BLOCK = 64  # inputs after which the best path so far is taken
_ROWS = 128  # of channels at once

# A state is 2 * newer + older bit of the path so far. With the bit that comes next paths are [bit, newer, older], and
# the best of both older bits is the next state as it lies.
_COSET_OF = COSETS.transpose(0, 2, 1).reshape(2, 4)


class _Cosets(NamedTuple):
    """What rounds to the nearest place within each coset."""

    inverse: np.ndarray  # float32 [lanes], of the distance of two places
    shift: np.ndarray  # float32 [..., 1]
    distance: np.ndarray  # float32 [lanes], of two places
    base: np.ndarray  # float32 [..., lanes], where place 0 lies
    places: int

    @classmethod
    def of(cls, coset: np.ndarray, steps: np.ndarray, rate: Rate) -> "_Cosets":
        """Args: int [...], what a coset adds to four times a place; float32 [lanes], the steps of the multipliers."""
        first = coset[..., None].astype(np.float32) - np.float32(rate.last / 2)
        inverse = np.divide(0.25, steps, out=np.zeros_like(steps), where=steps > 0)
        return cls(inverse, -first / 4, 4 * steps, first * steps, rate.places)

    def round(self, wanted: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Places, and what of the wanted is lost there: float32, `base` broadcast."""
        place = wanted * self.inverse + self.shift
        np.rint(place, out=place)
        np.maximum(place, 0, out=place)
        np.minimum(place, self.places - 1, out=place)
        error = place * self.distance
        error += self.base
        np.rint(error, out=error)
        return place, np.subtract(wanted, error, out=error)


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
    state = np.zeros(rows, np.intp)  # 2 * newer + older bit of the path so far
    width = max(size, _BLOCK // size * size)
    for start in range(0, inputs, width):
        stop = min(start + width, inputs)
        own = None if factor is None else factor[None, start:stop, start:stop]
        found, errors, chosen, state = trace_block(
            open_[start:stop], own, near[:, start // size : stop // size], state, rate
        )
        codes[start:stop], multipliers[start // size : stop // size] = found, chosen
        if factor is not None:
            open_[stop:] -= factor[start:stop, stop:].T @ errors
    return np.ascontiguousarray(codes.T), np.ascontiguousarray(multipliers.T)


def block_width(inputs: int, size: int) -> int:
    """How many inputs a block has where all blocks are equal: whole groups, and no more than `_BLOCK` if it can be."""
    groups = inputs // size
    most = max(1, min(groups, _BLOCK // size))
    return size * next(count for count in range(most, 0, -1) if groups % count == 0)


def trace_block(
    target: np.ndarray, factors: np.ndarray | None, near: np.ndarray, state: np.ndarray, rate: Rate
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """The next inputs of paths, of channels that may stand at different inputs.

    Args:
        target: float64 [inputs, channels], in units of the int8 grid, repaired for what came before.
        factors: float64 [parts, inputs, inputs], of as many equal parts of the channels; None: see `trace`.
        near: uint8 [channels, groups].
        state: intp [channels], 2 * newer + older bit of the path so far.
        rate: of the codes.

    Returns:
        uint8 codes [inputs, channels], float32 errors over pivots [inputs, channels] (without factors zeros), uint8
        multipliers [groups, channels], and the states where the paths have come to.
    """
    inputs, rows = target.shape
    target = target.astype(np.float32)
    factors = None if factors is None else factors.astype(np.float32)
    size, each = inputs // near.shape[1], np.arange(rows)
    cost = np.full((4, rows), np.inf, np.float32)
    cost[state, each] = 0
    codes, errors = np.zeros((inputs, 4, rows), np.uint8), np.zeros((inputs, 4, rows), np.float32)
    multipliers = np.zeros((near.shape[1], 4, rows), np.uint8)
    for group in range(near.shape[1]):
        start, stop = group * size, (group + 1) * size
        tried = np.stack([np.clip(near[:, group].astype(np.int64) + step, 0, LARGEST) for step in _TRIES])
        wanted, own = target[start:stop, None], None
        if factors is not None:
            own, wanted = factors[:, start:stop, start:stop], np.broadcast_to(wanted, (size, 4, rows))
            if start:
                wanted = wanted - _repairs(factors[:, :start, start:stop], errors[:start])
        cost, origin, found, lost, best = _group(wanted, own, cost, tried, rate)
        for kept in (codes[:start], errors[:start], multipliers[:group]):
            kept[:] = kept[:, origin, each]
        codes[start:stop], errors[start:stop] = found, lost
        multipliers[group] = tried[best, each]
    end = cost.argmin(0)
    codes = codes[:, end, each]
    state = 2 * (codes[-1] & 1).astype(np.intp) + (codes[-2] & 1)
    return codes, errors[:, end, each], multipliers[:, end, each], state


def _repairs(factors: np.ndarray, errors: np.ndarray) -> np.ndarray:
    """What errors [before, states, channels] do to the inputs after, [after, states, channels]."""
    before, states, rows = errors.shape
    parts = errors.reshape(before, states, len(factors), -1).transpose(2, 0, 1, 3).reshape(len(factors), before, -1)
    found = factors.transpose(0, 2, 1) @ parts  # [parts, after, states * channels of one]
    return found.reshape(len(factors), -1, states, rows // len(factors)).transpose(1, 2, 0, 3).reshape(-1, states, rows)


def _group(
    target: np.ndarray, factors: np.ndarray | None, cost: np.ndarray, tried: np.ndarray, rate: Rate
) -> tuple[np.ndarray, np.ndarray, np.ndarray, np.ndarray, np.ndarray]:
    """One group, all multipliers that are tried, side by side.

    Args:
        target: float32 [size, states, channels], of the paths that end in each state; [size, 1, channels] without
            factors.

    Returns:
        By end state [states, channels]: cost, state at the beginning, codes and errors over pivots [size, ...]
        (without factors zeros), which try was best.
    """
    size, _, rows = target.shape
    lanes = len(tried) * rows
    steps = rate.steps[tried].reshape(-1).astype(np.float32)
    target = np.tile(target, len(tried))
    total = np.tile(cost, len(tried))  # [states, lanes]
    others = np.empty((size, 4, lanes), bool)  # of a path that has come to a state: is its older bit 1?
    if factors is None:  # no path changes what is wanted
        lost = np.broadcast_to(np.float32(0), (size, 4, lanes))
        places, errors = _Cosets.of(np.arange(COSETS.max() + 1), steps, rate).round(target)
        errors *= errors
        for column in range(size):
            total = _survive(errors[column].take(_COSET_OF, 0), total, others[column])
        places = places.take(_COSET_OF, 1)
    else:
        places = np.empty((size, 2, 4, lanes), np.uint8)
        shares = np.tile(np.repeat(factors.transpose(1, 2, 0), rows // len(factors), 2), len(tried))
        total, lost = _repaired(target, shares, _Cosets.of(_COSET_OF, steps, rate), total, others, places)
    total = total.reshape(4, -1, rows)
    best = total.argmin(1)  # [states, channels]
    state, each = np.ogrid[:4, :rows]
    cost, lane = total[state, best, each], best * rows + each
    lost = lost[:, state, lane]
    codes = np.empty((size, 4, rows), np.uint8)
    for column in reversed(range(size)):
        bit, before = state // 2, 2 * (state % 2) + others[column, state, lane]
        codes[column] = 2 * places[column, bit, before, lane] + bit
        state = before
    return cost, state, codes, lost, best


def _repaired(
    target: np.ndarray, shares: np.ndarray, cosets: _Cosets, total: np.ndarray, others: np.ndarray, places: np.ndarray
) -> tuple[np.ndarray, np.ndarray]:
    """All columns of a group whose paths repair what they want: costs and errors over pivots of the paths that last.

    Args:
        target: float32 [size, states, lanes].
        shares: float32 [before, after, lanes], of `factors`.
        total: float32 [states, lanes], costs of the paths that come in.
        others: bool [size, states, lanes], filled: whether the older bit of the path that came to a state is 1.
        places: uint8 [size, bit, states, lanes], filled: of every path's next code.
    """
    size, _, lanes = target.shape
    paths = target  # what each path lost, and from the column on what it wants
    # where a path of the next states comes from, [newer, lanes], if the older bit was 0
    origin = 2 * lanes * np.arange(2)[:, None] + np.arange(lanes)
    of_bit = 4 * lanes * np.array([0, 0, 1, 1])[:, None]
    for column in range(size):
        wanted = paths[column]
        if column:
            wanted = wanted - np.einsum("bl,bsl->sl", shares[:column, column], paths[:column])
        places[column], error = cosets.round(wanted)
        error /= shares[column, column]
        total = _survive(error * error, total, others[column])
        came = (origin + others[column].reshape(2, 2, lanes) * lanes).reshape(4, lanes)
        paths = paths.reshape(size, -1).take(came.reshape(-1), 1).reshape(paths.shape)
        paths[column] = error.take(came + of_bit)
    return total, paths


def _survive(costs: np.ndarray, total: np.ndarray, other: np.ndarray) -> np.ndarray:
    """The best costs [states, lanes] of the next states; `other` is told where the older bit is 1.

    Args:
        costs: float32 [bit, states, lanes], overwritten.
        total: float32 [states, lanes].
    """
    costs += total
    older = costs.reshape(2, 2, 2, -1)  # [bit, newer, older, lanes]
    np.less(older[:, :, 1], older[:, :, 0], out=other.reshape(2, 2, -1))
    return np.minimum(older[:, :, 0], older[:, :, 1]).reshape(4, -1)
