"""Trellis-coded weights: what a code stands for depends on the two codes before it.

A code n of 3, 4 or 5 bits holds 2 u + b: a place u, and a bit b of the path. With the bits b1 and b2 of the two inputs
before,

    w[i] = LEVELS[m][2 n + b1 + 2 b2],

so that twice as many levels are within reach as codes, every second of them from one state; m, 0 .. 15, is the
multiplier that a group of neighbouring inputs shares, and the levels lie evenly in [-64, 64]. A channel's inputs are
one path from the first to the last, and both bits are 0 before it begins.

Source: trellis-coded quantisation (Marcellin and Fischer, 1990) with Ungerboeck's code of four states, in a form that
is linear: his 2 (b xor b2) is 2 b + 2 b2 but for a place, and the levels that this adds are worth 2 % of the error.
"""

from dataclasses import dataclass

import numpy as np

LARGEST = 15  # multiplier: 4 bits
TOP = 64  # of the levels, in magnitude: the products of two of them with uint8 sum up within 16 bits


@dataclass(frozen=True, slots=True, eq=False)
class Rate:
    """What codes of one width stand for.

    Attributes:
        num_bits: of a code.
        places: how many.
        last: number of the last level; the first is 0.
        steps: float64 [16], between two levels, by multiplier.
        levels: int8 [16, last + 1].
    """

    num_bits: int
    places: int
    last: int
    steps: np.ndarray
    levels: np.ndarray

    @classmethod
    def of(cls, num_bits: int) -> "Rate":
        """All that follows from the width."""
        places = 2 ** (num_bits - 1)
        last = 4 * (places - 1) + int(COSETS.max())
        steps = np.arange(LARGEST + 1) * (2 * TOP / (LARGEST * last))
        levels = np.rint((np.arange(last + 1) - last / 2) * steps[:, None]).astype(np.int8)
        return cls(num_bits, places, last, steps, levels)


def _coset(bit: np.ndarray, older: np.ndarray, newer: np.ndarray) -> np.ndarray:
    """What the path adds to four times a place: its bit now, and the bits of the two inputs before."""
    added: np.ndarray = 2 * bit + 2 * older + newer
    return added


COSETS = _coset(*np.ogrid[:2, :2, :2])  # [bit, older, newer]
RATES = {num_bits: Rate.of(num_bits) for num_bits in (3, 4, 5)}


def levels_of(codes: np.ndarray, multipliers: np.ndarray, num_bits: int = 4) -> np.ndarray:
    """What kernels multiply, int8 [channels, inputs].

    Args:
        codes: uint8 [channels, inputs], below 2 ** num_bits.
        multipliers: uint8 [channels, groups].
    """
    each = np.repeat(multipliers, codes.shape[1] // multipliers.shape[1], axis=1)
    bits = np.pad(codes & 1, ((0, 0), (2, 0)))
    return RATES[num_bits].levels[each, 2 * codes + bits[:, 1:-1] + 2 * bits[:, :-2]]


# Codes of 4 bits: a byte holds two neighbouring inputs: the first's place (bits 0 to 2), the second's (3 to 5), and
# their bits of the path (6 and 7). In the table that files look pairs of levels up in, the number of a row is
#     byte + 256 * the two bits of the byte before + 1024 * multiplier,
# which a product of unsigned bytes gives: of the byte, of the one before under a mask, and of the shifted multiplier.
PATH_BITS = 0xC0
_SHIFT = 4  # of multipliers, so that their coefficient is a byte

# Codes of 3 and 5 bits lie in two planes: the places of two inputs, in 4 and 8 bits, and their two bits of the path.
# The number of a row is
#     the two bits + 4 * those of the pair before + 16 * places + 2 ** (4 + bits of both places) * multiplier.
PLANES = (3, 5)


def shifted(multipliers: np.ndarray) -> np.ndarray:
    """Multipliers as the product wants them, uint8."""
    return (multipliers << _SHIFT).astype(np.uint8)


def row_numbers(rows: int, num_bits: int = 4) -> np.ndarray:
    """What a group is multiplied with, for the numbers of its rows of the table, uint8 [rows, columns].

    A column of the group is, for codes of 4 bits, its bytes, these masked by `PATH_BITS`, the last masked byte of the
    group before, and the shifted multiplier; for others its places, its bits of the path, the last of those of the
    group before, and the shifted multiplier twice: what it counts for is one more than a byte holds.
    """
    before = np.eye(rows, rows + 1, -1, np.uint8)
    before[:1, rows] = 1
    own = np.eye(rows, dtype=np.uint8)
    if num_bits == 4:
        multiplier = np.full((rows, 1), 1024 >> _SHIFT, np.uint8)
        return np.hstack([own, 256 // (PATH_BITS & -PATH_BITS) * before, multiplier])
    counts = 2 ** (2 * num_bits - 2)  # 4 + bits of both places - _SHIFT
    multiplier = np.tile(np.array([counts - 1, 1], np.uint8), (rows, 1))
    now = np.hstack([own, np.zeros((rows, 1), np.uint8)])
    return np.hstack([16 * own, now + 4 * before, multiplier]).astype(np.uint8)


def level_numbers(num_bits: int = 4) -> tuple[np.ndarray, np.ndarray]:
    """What places and the path add up to: the numbers of the two levels that a row says, first input first.

    Returns:
        uint8 [1, places of two, 2] and [16, 1, 2] for codes of 4 bits, [places of two, 1, 2] and [1, 16, 2] for others:
        their sum has all rows of a multiplier in order.
    """
    places = RATES[num_bits].places
    both = np.arange(places**2)
    of_places = np.stack([4 * (both % places), 4 * (both // places)], -1).astype(np.uint8)
    newer, older, second, first = np.ogrid[:2, :2, :2, :2]
    by_input = np.broadcast_arrays(_coset(first, older, newer), _coset(second, newer, first))
    of_path = np.stack(by_input, -1).reshape(-1, 2).astype(np.uint8)
    return (of_places[None], of_path[:, None]) if num_bits == 4 else (of_places[:, None], of_path[None])


@dataclass(frozen=True, slots=True, eq=False)
class Coded:
    """A matrix as paths through the trellis.

    Attributes:
        codes: uint8 [channels, inputs].
        multipliers: uint8 [channels, groups].
        axis: of the channels in the matrix, 0 or 1.
        num_bits: of a code.
    """

    codes: np.ndarray
    multipliers: np.ndarray
    axis: int
    num_bits: int = 4

    @classmethod
    def of_bytes(cls, packed: np.ndarray, multipliers: np.ndarray, axis: int) -> "Coded":
        """The inverse of `bytes` and `multiplier_rows`."""
        pairs = np.stack([(packed & 7) << 1 | packed >> 6 & 1, (packed >> 3 & 7) << 1 | packed >> 7])
        codes = pairs.transpose(3, 1, 2, 0).reshape(packed.shape[2], -1)
        return cls(codes, np.ascontiguousarray(multipliers[:, 0].T), axis)

    @classmethod
    def of_planes(
        cls, places: np.ndarray, path: np.ndarray, multipliers: np.ndarray, axis: int, num_bits: int
    ) -> "Coded":
        """The inverse of `planes` and `multiplier_rows`."""
        groups, _, _, channels = path.shape
        both = places if num_bits == 5 else np.stack([places & 15, places >> 4], 2)
        both = both.reshape(groups, -1, channels).astype(np.uint8)
        bits = (path >> 2 * np.arange(4, dtype=np.uint8)[:, None] & 3).reshape(both.shape).astype(np.uint8)
        size = num_bits - 1
        pairs = np.stack([(both & 2**size - 1) << 1 | bits & 1, (both >> size) << 1 | bits >> 1])
        codes = pairs.transpose(3, 1, 2, 0).reshape(channels, -1).astype(np.uint8)
        return cls(codes, np.ascontiguousarray(multipliers[:, 0].T), axis, num_bits)

    @property
    def bytes(self) -> np.ndarray:
        """Codes of 4 bits, two neighbouring inputs of a channel a byte, uint8 [groups, inputs of one / 2, channels]."""
        channels, groups = self.multipliers.shape
        first, second = self.codes[:, 0::2], self.codes[:, 1::2]
        packed = first >> 1 | (second >> 1) << 3 | (first & 1) << 6 | (second & 1) << 7
        return np.ascontiguousarray(packed.T).reshape(groups, -1, channels)

    @property
    def planes(self) -> tuple[np.ndarray, np.ndarray]:
        """Codes of 3 or 5 bits: places and bits of the path of two neighbouring inputs each.

        Returns:
            uint8 [groups, inputs of one / 4, 1, channels], two pairs' places in one byte, or, of 5 bits, [groups,
            inputs of one / 2, channels]; and uint8 [groups, inputs of one / 8, 1, channels], four pairs' bits in one.
        """
        channels, groups = self.multipliers.shape
        first, second = self.codes[:, 0::2], self.codes[:, 1::2]
        both = (first >> 1 | (second >> 1) << self.num_bits - 1).T.reshape(groups, -1, channels)
        bits = (first & 1 | (second & 1) << 1).T.reshape(groups, -1, 4, channels)
        path = (bits << 2 * np.arange(4, dtype=np.uint8)[:, None]).sum(2, keepdims=True, dtype=np.uint8)
        if self.num_bits == 5:
            return np.ascontiguousarray(both), path
        nibbles = both.reshape(groups, -1, 2, channels)
        return nibbles[:, :, :1] | nibbles[:, :, 1:] << 4, path

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
        rows = levels_of(self.codes, self.multipliers, self.num_bits)
        return np.ascontiguousarray(rows.T) if self.axis else rows
