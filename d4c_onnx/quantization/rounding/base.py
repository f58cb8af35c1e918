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
        num_bits: width of the grid.
    """

    integers: np.ndarray
    scale: np.ndarray
    num_bits: int

    def dequantize(self) -> np.ndarray:
        """float32 [channels, inputs]."""
        return self.integers.astype(np.float32) * self.scale[:, None]


class Rounding(Protocol):
    """One method."""

    def round(self, weight: np.ndarray, num_bits: int) -> QuantizedWeight:
        """Round a weight.

        Args:
            weight: float32 [channels, inputs], output channels first.
            num_bits: 4, 6 or 8.
        """
        ...


def grid_limits(num_bits: int) -> tuple[int, int]:
    """Lowest and highest integer of the signed grid; 4 bits: -8 .. 7."""
    return -(2 ** (num_bits - 1)), 2 ** (num_bits - 1) - 1
