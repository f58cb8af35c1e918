"""Range observers: one pass for the extremes, one for a histogram, then a search for the range of least square error.

Memory is one histogram per tensor, whatever the number of samples; all samples count, not only the first batches.
"""

from dataclasses import dataclass, field

import numpy as np

from d4c_onnx.errors import CalibrationError

BINS = 2048
_SHRINK = np.linspace(1.0, 0.1, 91).tolist()  # candidate fractions of each observed extreme
_AT_ONCE = 8  # candidates whose errors are computed side by side: they fit into a core's cache
_TINY, _LARGEST = float(np.finfo(np.float32).tiny), float(np.finfo(np.float32).max)

_NOT_FINITE = "an activation is not finite in float32. The model or its calibration set is broken."


@dataclass(frozen=True, slots=True)
class QuantParams:
    """Affine quantisation of one tensor: real = scale * (integer - zero_point), integer in [0, 2**num_bits - 1].

    Attributes:
        two_terms: what this grid leaves of a value is rounded, too, to the grid `remainder`, and added.
    """

    scale: float
    zero_point: int
    num_bits: int
    two_terms: bool = False

    @property
    def remainder(self) -> "QuantParams":
        """The grid of as many levels over one step, half of it on either side, of which the last level is cut off."""
        top = 2**self.num_bits - 1
        return QuantParams(float(np.float32(self.scale / top)), 2 ** (self.num_bits - 1), self.num_bits)

    @property
    def range(self) -> tuple[float, float]:
        """The lowest and highest real value on the grid."""
        top = 2**self.num_bits - 1
        return (0 - self.zero_point) * self.scale, (top - self.zero_point) * self.scale

    def round(self, values: np.ndarray) -> np.ndarray:
        """The nearest values on the grid (ties to even); what lies outside is clipped to its ends."""
        integers = np.clip(np.rint(values / self.scale) + self.zero_point, 0, 2**self.num_bits - 1)
        rounded = np.asarray((integers - self.zero_point) * self.scale)
        return rounded + self.remainder.round(values - rounded) if self.two_terms else rounded


def quant_params(low: float, high: float, num_bits: int, symmetric: bool = False) -> QuantParams:
    """The unsigned affine grid that covers [low, high] and holds an exact zero.

    Args:
        low, high: float range; widened to contain 0, which padding and ReLU need exactly.
        num_bits: width of the grid.
        symmetric: zero lies in the middle: shifted by half its width, the grid is a signed one of zero point 0.

    Raises:
        CalibrationError: there is no such grid in float32.
    """
    top = 2**num_bits - 1
    low, high = min(float(low), 0.0), max(float(high), 0.0)
    if not high - low <= _LARGEST:  # so that what is not a number fails, too
        raise CalibrationError(_NOT_FINITE)
    if symmetric:
        half = 2 ** (num_bits - 1)
        scale = float(np.float32(max(-low / half, high / (half - 1))))
        return QuantParams(scale if scale > _TINY else 1.0 / top, half, num_bits)
    # float32 is what the file stores; a constant-zero tensor gets a harmless unit grid
    scale = float(np.float32((high - low) / top))
    if scale <= _TINY:
        return QuantParams(1.0 / top, 0, num_bits)
    return QuantParams(scale, min(max(round(-low / scale), 0), top), num_bits)


@dataclass(slots=True)
class RangeObserver:
    """Extremes, then a histogram, of one activation tensor."""

    low: float = np.inf
    high: float = -np.inf
    counts: np.ndarray = field(default_factory=lambda: np.zeros(0, np.int64))
    most: float = np.inf  # that the value can be, such as a ReLU6's 6: there is nothing beyond to leave room for

    def observe_extremes(self, values: np.ndarray) -> None:
        """First pass. Raises CalibrationError on NaN or infinity."""
        low, high = float(values.min()), float(values.max())
        if not (np.isfinite(low) and np.isfinite(high)):
            raise CalibrationError(_NOT_FINITE)
        self.low, self.high = min(self.low, low), max(self.high, high)

    def observe_histogram(self, values: np.ndarray) -> None:
        """Second pass, over the same samples."""
        if not len(self.counts):
            self.counts = np.zeros(BINS, np.int64)
        width = (self.high - self.low) / BINS
        if width < _TINY:  # constant, as far as float32 can tell: 1 / width would overflow
            self.counts[0] += values.size
            return
        index = ((values.ravel() - np.float32(self.low)) * np.float32(1 / width)).astype(np.int32)
        np.clip(index, 0, BINS - 1, out=index)
        self.counts += np.bincount(index, minlength=BINS)

    def minmax(self, num_bits: int, headroom: float = 1.0, symmetric: bool = False) -> QuantParams:
        """The grid over everything observed, stretched by `headroom`."""
        return quant_params(*self._stretched(headroom), num_bits, symmetric)

    def mse(
        self, num_bits: int, headroom: float = 1.0, clip_weight: float = 1.0, symmetric: bool = False
    ) -> QuantParams:
        """The grid of least mean square error over all observed values.

        Both ends of the range are searched in turn (coordinate descent from the observed extremes), each over 91
        fractions; the error of a candidate is read from the histogram instead of the samples.

        Synthetic images are not the images the model will serve: where a served value lies outside what was observed,
        clipping it costs far more than a slightly coarser step. So the observed values are stretched by `headroom`
        before the search, and the square error of a clipped value counts `clip_weight` times.

        Source: the MSE range search of arXiv 2511.15411's code (25,600 full passes a tensor there); headroom and clip
        weight are ours, measured in docs/fidelity.md.
        """
        centers = self.low + (np.arange(BINS) + 0.5) * (self.high - self.low) / BINS
        used = self.counts > 0
        values, weights = np.minimum(centers[used] * headroom, self.most), self.counts[used].astype(np.float64)
        low, high = self._stretched(headroom)
        best, least = quant_params(low, high, num_bits, symmetric), np.inf
        for _ in range(3):
            ends = (*((low * s, high) for s in _SHRINK), *((low, high * s) for s in _SHRINK))
            grids = list(dict.fromkeys(quant_params(*pair, num_bits, symmetric) for pair in ends))
            errors = _square_errors(values, weights, grids, clip_weight)
            first = int(errors.argmin())
            if errors[first] >= least:
                break
            best, least = grids[first], errors[first]
            low, high = best.range
        return best

    def _stretched(self, headroom: float) -> tuple[float, float]:
        return min(self.low, 0.0) * headroom, min(max(self.high, 0.0) * headroom, self.most)


def _square_errors(values: np.ndarray, weights: np.ndarray, grids: list[QuantParams], clip_weight: float) -> np.ndarray:
    """Of each grid, over all values: float64 [grids]."""
    found = []
    for start in range(0, len(grids), _AT_ONCE):
        some = grids[start : start + _AT_ONCE]
        scale = np.array([[grid.scale] for grid in some])
        zero_point = np.array([[float(grid.zero_point)] for grid in some])
        integers = np.rint(values / scale) + zero_point
        kept = np.clip(integers, 0, 2 ** some[0].num_bits - 1)
        error = np.square((kept - zero_point) * scale - values)
        np.multiply(error, clip_weight, out=error, where=kept != integers)
        found.append(error @ weights)
    return np.concatenate(found)
