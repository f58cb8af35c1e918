"""Other views of calibration images: what makes more of few images without synthesising any.

Moments of a few dozen images are noisy, and every image takes gradients to make. A part of an image at full size,
mirrored half of the time, shows a tower other textures, scales and positions.
"""

from collections.abc import Sequence

import numpy as np
from PIL import Image

_AREAS = (0.09, 1.0)  # of a part, as shares of the image's


def views(pixels: np.ndarray, seed: int | Sequence[int]) -> np.ndarray:
    """One view of each image, float32 [B, 3, H, W], bicubic.

    Args:
        pixels: float32 [B, 3, H, W], preprocessed.
        seed: the same one gives the same views.
    """
    rng = np.random.default_rng(seed)
    return np.stack([_view(image, rng) for image in pixels])


def _view(image: np.ndarray, rng: np.random.Generator) -> np.ndarray:
    height, width = image.shape[1:]
    side = np.sqrt(rng.uniform(*_AREAS))
    left, top = rng.uniform(0, 1 - side, 2) * (width, height)
    box = (left, top, left + side * width, top + side * height)
    planes = [Image.fromarray(plane).resize((width, height), Image.Resampling.BICUBIC, box) for plane in image]
    view = np.stack([np.asarray(plane) for plane in planes])
    return view[:, :, ::-1] if rng.random() < 0.5 else view
