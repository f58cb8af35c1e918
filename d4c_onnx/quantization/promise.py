"""Which rungs of two ladders keep a promise with the smallest files: bisection, over each encoder by itself.

A promise on cosine holds for each tower, so that each has its own answer. Top-1 is an answer of both together: there
both ladders are climbed side by side, from where the promise on cosine (if there is one) let them stop.
"""

from __future__ import annotations

from collections.abc import Callable

Pair = tuple[int, int]


def search(
    rungs: Pair,
    cosines: Callable[[Pair], tuple[float, float]] | None,
    target_cosine: float | None,
    lost: Callable[[Pair], float] | None,
    max_drop: float | None,
) -> Pair | None:
    """The lowest rungs of both ladders that keep what was promised; None where the highest do not.

    That a higher rung answers better is taken for granted between two that were tried; what is returned was tried.

    Args:
        rungs: how many each ladder has.
        cosines: measured of a pair of rungs: each tower's mean cosine to FP32.
        lost: measured of a pair of rungs: percentage points of top-1 below FP32.
    """
    start: Pair | None = (0, 0)
    if cosines is not None and target_cosine is not None:
        start = _each(rungs, cosines, target_cosine)
    if start is None or lost is None or max_drop is None:
        return start
    return _side_by_side(start, rungs, lost, max_drop)


def _each(rungs: Pair, cosines: Callable[[Pair], tuple[float, float]], least: float) -> Pair | None:
    low, high = [0, 0], list(rungs)
    while any(low[tower] < high[tower] for tower in (0, 1)):
        tried = [min((low[tower] + high[tower]) // 2, rungs[tower] - 1) for tower in (0, 1)]
        found = cosines((tried[0], tried[1]))
        for tower in (0, 1):
            if low[tower] == high[tower]:
                continue
            if found[tower] >= least:  # what is not a number fails, too
                high[tower] = tried[tower]
            else:
                low[tower] = tried[tower] + 1
            if low[tower] == rungs[tower]:
                return None
    return high[0], high[1]


def _side_by_side(start: Pair, rungs: Pair, lost: Callable[[Pair], float], most: float) -> Pair | None:
    def above(steps: int) -> Pair:
        return min(start[0] + steps, rungs[0] - 1), min(start[1] + steps, rungs[1] - 1)

    count = max(rungs[0] - start[0], rungs[1] - start[1])
    low, high = 0, count
    while low < high:
        tried = (low + high) // 2
        if lost(above(tried)) <= most:
            high = tried
        else:
            low = tried + 1
    return above(high) if high < count else None
