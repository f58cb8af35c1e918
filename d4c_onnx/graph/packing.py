"""4-bit integers as bytes, and matrices whose channels' inputs share multipliers in groups."""

from dataclasses import dataclass

import numpy as np


def pack_int4(values: np.ndarray) -> bytes:
    """Two values a byte, the first in the low nibble, row-major: ONNX's INT4 layout, and UINT4's.

    Args:
        values: integers in [-8, 7], or in [0, 15], any shape.
    """
    flat = np.asarray(values).astype(np.int8).ravel()
    if flat.size % 2:
        flat = np.append(flat, np.int8(0))
    nibbles = flat.view(np.uint8) & 0x0F
    return (nibbles[0::2] | (nibbles[1::2] << 4)).astype(np.uint8).tobytes()


def unpack_int4(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack_int4` for signed values: int8 of the given shape."""
    return ((unpack_uint4(raw, shape) ^ 8).astype(np.int8) - 8).astype(np.int8)


def unpack_uint4(raw: bytes, shape: tuple[int, ...]) -> np.ndarray:
    """The inverse of `pack_int4` for unsigned values: uint8 of the given shape."""
    packed = np.frombuffer(raw, np.uint8)
    return np.stack([packed & 0x0F, packed >> 4], 1).ravel()[: int(np.prod(shape, dtype=np.int64))].reshape(shape)


@dataclass(frozen=True, slots=True, eq=False)
class Grouped:
    """A matrix of 4-bit integers, and the multipliers that groups of neighbouring inputs of a channel share.

    In three dimensions, as forms store it, it is [channels, groups, size] where the channels come first, and
    [groups, size, channels] where the inputs do; the multipliers are the same with size 1.

    Attributes:
        integers: int8, of the matrix's own shape.
        multipliers: uint8 [channels, groups].
        axis: of the channels, 0 or 1.
    """

    integers: np.ndarray
    multipliers: np.ndarray
    axis: int

    @classmethod
    def of_blocks(cls, blocks: np.ndarray, multipliers: np.ndarray, axis: int) -> "Grouped":
        """The inverse of `blocks` and `multiplier_blocks`."""
        shape = (len(blocks), -1) if axis == 0 else (-1, blocks.shape[2])
        rows = multipliers[:, :, 0] if axis == 0 else multipliers[:, 0].T
        return cls(blocks.reshape(shape), np.ascontiguousarray(rows), axis)

    @property
    def blocks(self) -> np.ndarray:
        """The integers in three dimensions."""
        channels, groups = self.multipliers.shape
        return self.integers.reshape((channels, groups, -1) if self.axis == 0 else (groups, -1, channels))

    @property
    def multiplier_blocks(self) -> np.ndarray:
        """The multipliers in three dimensions."""
        return self.multipliers[:, :, None] if self.axis == 0 else np.ascontiguousarray(self.multipliers.T)[:, None]

    @property
    def products(self) -> np.ndarray:
        """int8, of the matrix's own shape: what kernels multiply."""
        return (self.blocks * self.multiplier_blocks.astype(np.int8)).reshape(self.integers.shape)
