"""Trellis-coded weights: what a nibble stands for depends on the two nibbles before it.

A nibble holds 2 u + b: a place u in 0 .. 7, and a bit b of the path. With the bits b1 and b2 of the two inputs before,

    w[i] = LEVELS[m][4 u + c],    c = 2 (b xor b2) + b1,

so that 32 levels are within reach of 4 bits, every second of them from one state; m, 0 .. 15, is the multiplier that a
group of neighbouring inputs shares, and LEVELS[m] lies evenly in [-64, 64]. A channel's inputs are one path from the
first to the last, and both bits are 0 before it begins.

Source: trellis-coded quantisation (Marcellin and Fischer, 1990) with Ungerboeck's code of four states.
"""

from dataclasses import dataclass

import numpy as np

LARGEST = 15  # multiplier: 4 bits
TOP = 64  # of the levels, in magnitude: the products of two of them with uint8 sum up within 16 bits
LAST = 31  # level

STEPS = np.arange(LARGEST + 1) * (2 * TOP / (LARGEST * LAST))  # between two levels, by multiplier
LEVELS = np.rint((np.arange(LAST + 1) - LAST / 2) * STEPS[:, None]).astype(np.int8)


# c by the path's bit now (0), and the bits of the two inputs before: [b, b2, b1]
COSETS = np.array([[[0, 1], [2, 3]], [[2, 3], [0, 1]]], np.uint8)


def levels_of(codes: np.ndarray, multipliers: np.ndarray) -> np.ndarray:
    """What kernels multiply, int8 [channels, inputs].

    Args:
        codes: uint8 [channels, inputs], nibbles.
        multipliers: uint8 [channels, groups].
    """
    each = np.repeat(multipliers, codes.shape[1] // multipliers.shape[1], axis=1)
    bits = np.pad(codes & 1, ((0, 0), (2, 0)))
    return LEVELS[each, 4 * (codes >> 1) + COSETS[bits[:, 2:], bits[:, :-2], bits[:, 1:-1]]]


PATH_BITS = 0x11  # where a byte of two nibbles has the bits of its path


def multiplier_bits(multipliers: np.ndarray) -> np.ndarray:
    """Multipliers spread over bits that `PATH_BITS` leave free, uint8 below 64."""
    return ((multipliers & 7) << 1 | (multipliers >> 3) << 5).astype(np.uint8)


def level_numbers() -> np.ndarray:
    """The numbers of the two levels that a byte's nibbles say, low one first, uint8 [1024, 2].

    A row is 512 times the path's bit of the input before, 256 times that of the one before it, and the byte.
    """
    newer, older, byte = np.ogrid[:2, :2, :256]
    low, high = byte & 15, byte >> 4
    first = 4 * (low >> 1) + COSETS[low & 1, older, newer]
    second = 4 * (high >> 1) + COSETS[high & 1, newer, low & 1]
    return np.stack(np.broadcast_arrays(first, second), -1).reshape(-1, 2).astype(np.uint8)


# In the table that files look levels up in a row is the byte and 256 times the bits of the multiplier and of the path
# in the byte before: the highest bit of the multiplier, the newer one of the path, the other three, the older one. The
# levels of `level_numbers`, by [multiplier, path, byte, nibble], come into that order so.
BY_BITS = (2, 8, 2, 2, 256, 2)
BITS_ORDER = (0, 2, 1, 3, 4, 5)


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A matrix as paths through the trellis.

    Attributes:
        codes: uint8 [channels, inputs], nibbles.
        multipliers: uint8 [channels, groups].
        axis: of the channels in the matrix, 0 or 1.
    """

    codes: np.ndarray
    multipliers: np.ndarray
    axis: int

    @classmethod
    def of_bytes(cls, packed: np.ndarray, multipliers: np.ndarray, axis: int) -> "Coded":
        """The inverse of `bytes`; multipliers [channels, groups], or [groups, channels] where channels are axis 1."""
        rows = packed.T if axis else packed
        codes = np.stack([rows & 15, rows >> 4], 2).reshape(len(rows), -1)
        return cls(codes, np.ascontiguousarray(multipliers.T if axis else multipliers), axis)

    @property
    def bytes(self) -> np.ndarray:
        """Two neighbouring inputs of a channel a byte, the first in the low nibble; inputs first where `axis` is 1."""
        packed = self.codes[:, 0::2] | self.codes[:, 1::2] << 4
        return np.ascontiguousarray(packed.T if self.axis else packed)

    @property
    def multiplier_blocks(self) -> np.ndarray:
        """uint8 [channels, groups, 1]; [groups, 1, channels] where `axis` is 1."""
        return np.ascontiguousarray(self.multipliers.T)[:, None] if self.axis else self.multipliers[:, :, None]

    @property
    def shape(self) -> tuple[int, int]:
        """Of the matrix."""
        channels, inputs = self.codes.shape
        return (inputs, channels) if self.axis else (channels, inputs)

    @property
    def levels(self) -> np.ndarray:
        """int8 of the matrix's shape: what kernels multiply."""
        rows = levels_of(self.codes, self.multipliers)
        return np.ascontiguousarray(rows.T) if self.axis else rows
