"""Images from wherever they are: a path, bytes, an array or pillow's own; what is no image, or too large, by name.

Nothing of an image is decoded before its size is known: a file of kilobytes may stand for gigabytes of pixels.
"""

import functools
import io
from pathlib import Path
from typing import BinaryIO

import numpy as np
from PIL import Image, UnidentifiedImageError

from d4c_onnx.errors import DatasetError
from d4c_onnx.untrusted_json import check_readable, short

ImageLike = str | Path | bytes | np.ndarray | Image.Image

MOST_PIXELS = 2**26  # of an image as it is stored: 8,192 x 8,192
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp")
# Not every format that pillow knows: EPS, for one, is run by another program.
_FORMATS = ("JPEG", "PNG", "WEBP", "BMP", "GIF", "TIFF", "PPM", "MPO", "ICO", "JPEG2000", "AVIF")


def read_image(source: ImageLike, most_pixels: int = MOST_PIXELS) -> Image.Image:
    """An image in memory, in the mode in which it came: `preprocess_image` makes it RGB.

    Args:
        source: a file's path, an encoded image's bytes, uint8 [H, W] or [H, W, 1, 3 or 4], or pillow's own.
        most_pixels: an image of more is refused.

    Raises:
        DatasetError: it cannot be read, is no image, has too many pixels, or is an array of another form.
    """
    if isinstance(source, Image.Image):
        _check_size(source, most_pixels)
        return source
    if isinstance(source, np.ndarray):
        return _of_array(source, most_pixels)
    if isinstance(source, str | Path):
        check_readable(source, DatasetError)
        if not Path(source).is_file():  # a pipe would be waited for
            raise DatasetError(f"{source}: no such file, or a folder, a pipe or a device.")
    try:
        if isinstance(source, bytes):
            return _decode(io.BytesIO(source), most_pixels)
        with open(source, "rb") as file:
            return _decode(file, most_pixels)
    except (Image.DecompressionBombError, Image.DecompressionBombWarning) as error:
        raise DatasetError(f"an image of too many pixels ({short(error)}). Make it smaller first.") from error
    except UnidentifiedImageError as error:
        raise DatasetError(f"not an image ({', '.join(_readable())}).") from error
    except (OSError, ValueError, SyntaxError, EOFError, OverflowError, MemoryError) as error:
        raise DatasetError(f"not an image, or a damaged one ({short(error)}).") from error


def _decode(file: BinaryIO, most_pixels: int) -> Image.Image:
    image = Image.open(file, formats=_readable())
    _check_size(image, most_pixels)
    image.load()
    return image


@functools.cache
def _readable() -> tuple[str, ...]:
    """The formats that this pillow was built with."""
    Image.init()
    return tuple(name for name in _FORMATS if name in Image.OPEN)


def _check_size(image: Image.Image, most_pixels: int) -> None:
    pixels = image.width * image.height
    if pixels > most_pixels:
        raise DatasetError(
            f"an image of {image.width} x {image.height} pixels, more than the {most_pixels:,} that are read. Make it "
            "smaller first, or raise the limit."
        )


def _of_array(array: np.ndarray, most_pixels: int) -> Image.Image:
    shape = array.shape[:-1] if array.ndim == 3 and array.shape[-1] == 1 else array.shape
    if array.dtype != np.uint8 or not (len(shape) == 2 or (len(shape) == 3 and shape[-1] in (3, 4))):
        raise DatasetError(
            f"an array of {array.dtype} {array.shape}: takes uint8 of 0..255, [H, W], [H, W, 3] in RGB or [H, W, 4] in "
            "RGBA."
        )
    if shape[0] * shape[1] > most_pixels:
        raise DatasetError(f"an image of {shape[1]} x {shape[0]} pixels, more than the {most_pixels:,} that are read.")
    if 0 in shape:
        raise DatasetError(f"an image of {shape[1]} x {shape[0]} pixels has nothing to look at.")
    return Image.fromarray(np.ascontiguousarray(array.reshape(shape)))
