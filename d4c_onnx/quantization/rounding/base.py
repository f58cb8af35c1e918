"""The interface that every rounding plugs into."""

from dataclasses import dataclass
from typing import Protocol

import numpy as np


@dataclass(frozen=True, slots=True)
class QuantizedWeight:
    """A weight on a symmetric per-channel grid.

    Attributes:
        integers: int8 [channels, inputs], each in [-2**(num_bits-1), 2**(num_bits-1) - 1].
        scale: float32 [channels], positive; real = integer * scale.
        num_bits: width of the grid; 4 bits are stored in 4, wider grids in 8.
    """

    integers: np.ndarray
    scale: np.ndarray
    num_bits: int

    def dequantize(self) -> np.ndarray:
        """float32 [channels, inputs]."""
        return self.integers.astype(np.float32) * self.scale[:, None]


@dataclass(frozen=True, slots=True)
class InputMoments:
    """What a rounding may know of a layer's input: x in float, x^ as the quantised encoder delivers it.

    Attributes:
        gram: float64 [inputs, inputs], second moments of x^.
        cross: float64 [inputs, inputs], second moments of x (rows) with x^ (columns).
    """

    gram: np.ndarray
    cross: np.ndarray


class Rounding(Protocol):
    """One method.

    Attributes:
        uses_data: whether `round` needs the layer's input moments.
        sequential: whether x^ must carry the errors of the layers before.
    """

    uses_data: bool
    sequential: bool

    def round(self, weight: np.ndarray, num_bits: int, moments: InputMoments | None = None) -> QuantizedWeight:
        """Round a weight.

        Args:
            weight: float32 [channels, inputs], output channels first.
            num_bits: 4, 6, 7 or 8.
            moments: of the layer's input; given when `uses_data`.
        """
        ...


def grid_limits(num_bits: int) -> tuple[int, int]:
    """Lowest and highest integer of the signed grid; 4 bits: -8 .. 7."""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1


def stored_bits(num_bits: int) -> int:
    """What a weight of that grid takes in the file."""
    return 4 if num_bits == 4 else 8
