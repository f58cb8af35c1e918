"""Image to pixel_values with pillow, as open_clip's own transform does it."""

import numpy as np
from PIL import Image

from d4c_onnx.manifest import Preprocess

_FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}


def preprocess_image(image: Image.Image, config: Preprocess) -> np.ndarray:
    """Resize, crop and normalise one image.

    Args:
        image: any mode; converted to RGB.
        config: the manifest's `preprocess`.

    Returns:
        float32 [3, H, W].
    """
    height, width = config.size
    image = image if image.mode == "RGB" else image.convert("RGB")
    image = _fit(image, height, width, config)
    pixels = np.asarray(image, np.float32) / np.float32(255)  # [H, W, 3]
    return normalize(pixels.transpose(2, 0, 1), config)


def normalize(pixels: np.ndarray, config: Preprocess) -> np.ndarray:
    """float32 [..., 3, H, W] in 0..1 to the model's input space."""
    mean = np.asarray(config.mean, np.float32)[:, None, None]
    std = np.asarray(config.std, np.float32)[:, None, None]
    return np.ascontiguousarray((pixels - mean) / std, np.float32)


def denormalize(pixel_values: np.ndarray, config: Preprocess) -> np.ndarray:
    """The inverse of `normalize`, clipped to 0..1: for looking at images."""
    mean = np.asarray(config.mean, np.float32)[:, None, None]
    std = np.asarray(config.std, np.float32)[:, None, None]
    return np.clip(pixel_values * std + mean, 0, 1)


def _fit(image: Image.Image, height: int, width: int, config: Preprocess) -> Image.Image:
    resample = _FILTERS.get(config.interpolation, Image.Resampling.BICUBIC)
    if config.resize_mode == "squash":
        return image.resize((width, height), resample)
    ratios = (height / image.height, width / image.width)
    if config.resize_mode == "longest":
        scale = min(ratios)
        image = image.resize((round(image.width * scale), round(image.height * scale)), resample)
        canvas = Image.new("RGB", (width, height), (config.fill_color,) * 3)
        canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
        return canvas
    if image.size != (width, height):
        # torchvision's rule: the short side becomes the target, the long side is truncated
        scale = max(ratios)
        short_is_height = ratios[0] >= ratios[1]
        new_h = height if short_is_height else int(image.height * scale)
        new_w = int(image.width * scale) if short_is_height else width
        image = image.resize((max(new_w, width), max(new_h, height)), resample)
    left, top = round((image.width - width) / 2), round((image.height - height) / 2)
    return image.crop((left, top, left + width, top + height))
