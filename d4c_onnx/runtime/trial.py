"""What written encoders are tried on beside random input: a drawn image of the model's own size, and a plain text."""

import numpy as np
from PIL import Image

from d4c_onnx.manifest import Preprocess
from d4c_onnx.runtime.preprocess import preprocess_image

TRIAL_TEXT = "a photo of a red boat on a lake."


def trial_pixels(preprocess: Preprocess) -> np.ndarray:
    """pixel_values float32 [1, 3, H, W] of the drawn image."""
    return preprocess_image(_drawn(*preprocess.size), preprocess)[None]


def _drawn(height: int, width: int) -> Image.Image:
    """Gradients, a disc and stripes, in RGB."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.06).astype(float)
    stripes = (np.sin(x * 40 + y * 13) > 0.6) * 0.3
    channels = [x * (1 - disc) + 0.9 * disc, y * (1 - disc) + stripes, 1 - (x + y) / 2 * (1 - disc)]
    return Image.fromarray((np.clip(np.stack(channels, -1), 0, 1) * 255).astype(np.uint8))
