"""Images that know nothing of the model: the controls every claim is measured beside."""

import numpy as np

from d4c_onnx.dead_leaves import dead_leaves, frequencies
from d4c_onnx.manifest import Preprocess
from d4c_onnx.runtime.preprocess import normalize


def control_images(method: str, count: int, preprocess: Preprocess, seed: int) -> np.ndarray:
    """Images of a method that asks no model and no data: pixel_values float32 [count, 3, H, W]."""
    if method == "leaves":
        return normalize(dead_leaves(count, preprocess.size, seed), preprocess)
    return noise_images(method, (count, 3, *preprocess.size), seed)


def noise_images(method: str, shape: tuple[int, ...], seed: int) -> np.ndarray:
    """Noise, float32 of `shape` in the normalised space.

    Args:
        method: noise: N(0, 1), every pixel on its own. pink: amplitude falls with 1 / f, as it does in photographs;
            each channel with mean 0 and standard deviation 1.
    """
    white = np.random.default_rng([seed, 3]).standard_normal(shape, dtype=np.float32)
    if method == "noise":
        return white
    height, width = shape[2:]
    pink = np.fft.irfft2(np.fft.rfft2(white) / frequencies(height, width), s=(height, width))
    return (pink / pink.std((2, 3), keepdims=True)).astype(np.float32)
