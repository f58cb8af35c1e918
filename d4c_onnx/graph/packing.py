"""4-bit integers as bytes."""

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
