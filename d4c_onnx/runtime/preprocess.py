"""Image to pixel_values with pillow, as open_clip's own transform does it, step by step.

The image is resized in the mode in which it came and becomes RGB after that: a cut-out's hidden colours and a palette's
neighbours then mix as they did before the model's eyes in training. Two kinds of images are converted first, because
open_clip's own answer is of no use: 16-bit grey, which turns white there, is scaled to 8 bits; and where images are
padded (`longest`) palettes and CMYK, whose padding would be any colour.
"""

import numpy as np
from PIL import Image, ImageOps

from d4c_onnx.errors import DatasetError
from d4c_onnx.manifest import Preprocess

FILTERS = {
    "bicubic": Image.Resampling.BICUBIC,
    "bilinear": Image.Resampling.BILINEAR,
    "nearest": Image.Resampling.NEAREST,
    "lanczos": Image.Resampling.LANCZOS,
    "box": Image.Resampling.BOX,
    "hamming": Image.Resampling.HAMMING,
}
_FULL_SCALE = 257  # 65535 / 255
_MOST_PIXELS = 2**27  # of a resized image; a strip of 60,000 x 1 pixels would have 3 milliards of them at 224


def preprocess_image(image: Image.Image, config: Preprocess, exif_rotation: bool = False) -> np.ndarray:
    """Resize, crop and normalise one image.

    Args:
        image: any mode; of an animated one the frame that it stands at, which is the first after opening.
        config: the manifest's `preprocess`.
        exif_rotation: turn the image upright first, as its EXIF entry says. open_clip does not: cameras' pictures
            are seen as their sensors lay.

    Returns:
        float32 [3, H, W].

    Raises:
        DatasetError: the image has no pixel, or pillow knows no way from its mode to RGB.
    """
    if 0 in image.size:
        raise DatasetError(f"an image of {image.width} x {image.height} pixels has nothing to look at.")
    if exif_rotation:
        image = ImageOps.exif_transpose(image)
    try:
        pixels = _rgb(_fit(_eight_bits(image), config))
    except ValueError as error:
        raise DatasetError(f"an image of mode {image.mode} cannot become RGB ({error}). Convert it first.") from error
    values = np.asarray(pixels, np.float32) / np.float32(255)  # [H, W, 3]
    return normalize(values.transpose(2, 0, 1), config)


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


def _rgb(image: Image.Image) -> Image.Image:
    if image.mode == "P" and isinstance(image.info.get("transparency"), bytes):
        image = image.convert("RGBA")  # the same colours, and pillow does not warn
    return image if image.mode == "RGB" else image.convert("RGB")


def _eight_bits(image: Image.Image) -> Image.Image:
    """16-bit grey as 8-bit grey; every other image as it is.

    Older pillow reads 16-bit PNGs as 32-bit integers; other images of that mode are 16-bit if a value says so.
    """
    sixteen = image.mode.startswith("I;16")
    if not sixteen and image.mode != "I":
        return image
    values = np.asarray(image)
    if sixteen or image.format == "PNG" or values.max(initial=0) > 255:
        return Image.fromarray(np.clip(np.rint(values / _FULL_SCALE), 0, 255).astype(np.uint8))
    return image


def filter_of(config: Preprocess) -> str:
    """The filter that resizes, one of `FILTERS`.

    One that is drawn in training is bicubic here; and so is open_clip's own crop to what is no square, whatever is
    asked for.
    """
    height, width = config.size
    only_bicubic = config.resize_mode == "shortest" and height != width
    return "bicubic" if only_bicubic or config.interpolation == "random" else config.interpolation


def _fit(image: Image.Image, config: Preprocess) -> Image.Image:
    """An image of the config's size, in the mode in which it came where that can be resized and padded."""
    height, width = config.size
    resample = FILTERS[filter_of(config)]
    if image.mode == "PA":  # pillow would average the numbers of its colours
        image = image.convert("RGBA")
    if config.resize_mode == "squash":
        return _resize(image, width, height, resample)
    if config.resize_mode == "longest":
        return _pad(image, config, resample)
    return _crop(image, config, resample)


def _resize(image: Image.Image, width: int, height: int, resample: Image.Resampling) -> Image.Image:
    return image if image.size == (width, height) else image.resize((width, height), resample)


def _crop(image: Image.Image, config: Preprocess, resample: Image.Resampling) -> Image.Image:
    """The middle of the image, after its shorter side became the config's."""
    height, width = config.size
    if height == width:  # torchvision's rule: the long side is rounded down
        short = min(image.size)
        new_width, new_height = (int(height * side / short) for side in image.size)
    else:  # open_clip's own
        ratio = min(image.height / height, image.width / width)
        new_width, new_height = (round(side / ratio) for side in image.size)
    left, top = round((new_width - width) / 2), round((new_height - height) / 2)
    if new_width * new_height <= _MOST_PIXELS:
        return _resize(image, new_width, new_height, resample).crop((left, top, left + width, top + height))
    # a long strip: the same pixels, but for rounding, without those that are cut away
    x, y = image.width / new_width, image.height / new_height
    box = (left * x, top * y, (left + width) * x, (top + height) * y)
    return image.resize((width, height), resample, box)


def _pad(image: Image.Image, config: Preprocess, resample: Image.Resampling) -> Image.Image:
    """All of the image in the middle of a canvas."""
    height, width = config.size
    if image.mode in ("P", "CMYK"):
        image = _rgb(image)
    ratio = max(image.height / height, image.width / width)
    new_width, new_height = (max(round(side / ratio), 1) for side in image.size)
    image = _resize(image, new_width, new_height, resample)
    bands = len(image.getbands())
    canvas = Image.new(image.mode, (width, height), (config.fill_color,) * bands if bands > 1 else config.fill_color)
    canvas.paste(image, ((width - image.width) // 2, (height - image.height) // 2))
    return canvas
