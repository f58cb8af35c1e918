"""Images that know nothing of the model: the controls every claim is measured beside."""

import numpy as np


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


def frequencies(height: int, width: int) -> np.ndarray:
    """Of every coefficient of `rfft2`, in cycles a pixel, float64 [H, W // 2 + 1]; the mean's counts as infinite."""
    found = np.hypot(np.fft.fftfreq(height)[:, None], np.fft.rfftfreq(width)[None])
    found[0, 0] = np.inf
    return found
