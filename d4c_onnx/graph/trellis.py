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


# A byte holds two neighbouring inputs: the first's place (bits 0 to 2), the second's (3 to 5), and their bits of the
# path (6 and 7). In the table that files look pairs of levels up in, the number of a row is
#     byte + 256 * the two bits of the byte before + 1024 * multiplier,
# which a product of unsigned bytes gives: of the byte, of the one before under a mask, and of the shifted multiplier.
PATH_BITS = 0xC0
_SHIFT = 4  # of multipliers, so that their coefficient is a byte


def shifted(multipliers: np.ndarray) -> np.ndarray:
    """Multipliers as the product wants them, uint8."""
    return (multipliers << _SHIFT).astype(np.uint8)


def row_numbers(rows: int) -> np.ndarray:
    """What a group is multiplied with, for the numbers of its rows of the table, uint8 [rows, 2 rows + 2].

    A column of the group is its bytes, these masked by `PATH_BITS`, the last masked byte of the group before, and the
    shifted multiplier.
    """
    before = np.eye(rows, rows + 1, -1, np.uint8)
    before[:1, rows] = 1
    multiplier = np.full((rows, 1), 1024 >> _SHIFT, np.uint8)
    return np.hstack([np.eye(rows, dtype=np.uint8), 256 // (PATH_BITS & -PATH_BITS) * before, multiplier])


def level_numbers() -> np.ndarray:
    """The numbers of the two levels that a byte says, first input first, uint8 [1024, 2].

    A row is 512 times the path's bit of the input before, 256 times that of the one before it, and the byte.
    """
    newer, older, byte = np.ogrid[:2, :2, :256]
    path = byte >> 6 & 1, byte >> 7
    first = 4 * (byte & 7) + COSETS[path[0], older, newer]
    second = 4 * (byte >> 3 & 7) + COSETS[path[1], newer, path[0]]
    return np.stack(np.broadcast_arrays(first, second), -1).reshape(-1, 2).astype(np.uint8)


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
        """The inverse of `bytes` and `multiplier_rows`."""
        pairs = np.stack([(packed & 7) << 1 | packed >> 6 & 1, (packed >> 3 & 7) << 1 | packed >> 7])
        codes = pairs.transpose(3, 1, 2, 0).reshape(packed.shape[2], -1)
        return cls(codes, np.ascontiguousarray(multipliers[:, 0].T), axis)

    @property
    def bytes(self) -> np.ndarray:
        """Two neighbouring inputs of a channel a byte, uint8 [groups, inputs of a group / 2, channels]."""
        channels, groups = self.multipliers.shape
        first, second = self.codes[:, 0::2], self.codes[:, 1::2]
        packed = first >> 1 | (second >> 1) << 3 | (first & 1) << 6 | (second & 1) << 7
        return np.ascontiguousarray(packed.T).reshape(groups, -1, channels)

    @property
    def multiplier_rows(self) -> np.ndarray:
        """uint8 [groups, 1, channels]."""
        return np.ascontiguousarray(self.multipliers.T)[:, None]

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
