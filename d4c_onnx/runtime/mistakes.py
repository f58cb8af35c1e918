"""What clients do wrong with images and texts, as values that can be computed: golden vectors are made to show them.

Each is near enough to what such a client computes to be known again by its embeddings, not always bit by bit.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
from PIL import Image

from d4c_onnx.manifest import PUBLISHED_PIXELS, Preprocess, TokenizerInfo
from d4c_onnx.runtime.preprocess import FILTERS, filter_of, preprocess_image
from d4c_onnx.runtime.tokenizer import TextTokenizer

# The kinds that a tolerance has to stay below; others are known by name only.
MEASURED = ("pixels", "colours", "mirrored", "crop", "filter")
_FILTERS = ("bilinear", "nearest", "bicubic")  # what clients resize with


@dataclass(frozen=True, slots=True)
class ImageMistake:
    """A wrong way from an image to pixel_values.

    Attributes:
        name: what is done wrong, as a person says it.
        kind: `pixels`, `colours`, `mirrored`, `crop`, `filter`; `alpha` and `near`, which some images alone show.
        pixels: an image and the right preprocessing to float32 [3, H, W].
    """

    name: str
    kind: str
    pixels: Callable[[Image.Image, Preprocess], np.ndarray]


@dataclass(frozen=True, slots=True)
class TextMistake:
    """A wrong way from a text to input_ids.

    Attributes:
        name: what is done wrong, as a person says it.
        ids: a text and its right ids to wrong ones; the right ones where this text does not show it.
    """

    name: str
    ids: Callable[[str, Sequence[int]], Sequence[int]]


def image_mistakes(preprocess: Preprocess) -> list[ImageMistake]:
    """The mistakes that a client can make with a model of this preprocessing."""
    own = (preprocess.mean, preprocess.std)
    found = [
        _other(f"mean and std of {who}" if who != "none" else "no mean and std", "pixels", mean=mean, std=std)
        for who, (mean, std) in PUBLISHED_PIXELS.items()
        if not np.allclose(own, (mean, std), atol=1e-4)
    ]
    found += [
        ImageMistake("channels in the order BGR", "colours", _changed(lambda pixels: pixels[::-1])),
        ImageMistake("image mirrored", "mirrored", _changed(lambda pixels: pixels[..., ::-1])),
        ImageMistake("pixels of 0..255 that were not divided by 255", "pixels", _changed(lambda pixels: pixels * 255)),
        *_crops(preprocess),
    ]
    found += [
        _other(f"resized with {name}", "filter", interpolation=name)
        for name in _FILTERS
        if name != filter_of(preprocess)
    ]
    return [*found, *_hardly_seen()]


def _crops(preprocess: Preprocess) -> list[ImageMistake]:
    """Other ways to the input's size."""
    names = {
        "squash": "squeezed to the size, not cropped",
        "longest": "padded to the size, not cropped",
        "shortest": "cropped",
    }
    found = [_other(names[mode], "crop", resize_mode=mode) for mode in names if mode != preprocess.resize_mode]
    if preprocess.resize_mode == "shortest":
        found += [
            ImageMistake("cropped at the top left, not in the middle", "crop", _corner),
            ImageMistake("resized to 8/7 of the size (256 for 224) and cropped", "crop", _middle_of_larger),
        ]
    return found


def _hardly_seen() -> list[ImageMistake]:
    return [
        ImageMistake("transparency laid over white", "alpha", _over("white")),
        ImageMistake("transparency laid over black", "alpha", _over("black")),
        ImageMistake("made RGB before it was resized", "alpha", lambda image, own: preprocess_image(_rgb(image), own)),
        _other("resized with lanczos", "near", interpolation="lanczos"),
        ImageMistake("resized without antialiasing (bilinear)", "near", _sampled(Image.Resampling.BILINEAR)),
        ImageMistake("resized without antialiasing (bicubic)", "near", _sampled(Image.Resampling.BICUBIC)),
    ]


def _other(name: str, kind: str, **settings: object) -> ImageMistake:
    return ImageMistake(name, kind, lambda image, own: preprocess_image(image, replace(own, **settings)))  # type: ignore[arg-type]


def _changed(change: Callable[[np.ndarray], np.ndarray]) -> Callable[[Image.Image, Preprocess], np.ndarray]:
    """A change of the pixels in 0..1, before mean and std."""

    def pixels(image: Image.Image, own: Preprocess) -> np.ndarray:
        mean, std = (np.asarray(values, np.float32)[:, None, None] for values in (own.mean, own.std))
        return ((change(preprocess_image(image, own) * std + mean) - mean) / std).astype(np.float32)

    return pixels


def _corner(image: Image.Image, own: Preprocess) -> np.ndarray:
    height, width = own.size
    ratio = min(image.width / width, image.height / height)
    return preprocess_image(image.crop((0, 0, round(width * ratio), round(height * ratio))), own)


def _middle_of_larger(image: Image.Image, own: Preprocess) -> np.ndarray:
    height, width = own.size
    ratio = round(min(own.size) * 8 / 7) / min(own.size) / min(image.width / width, image.height / height)
    sides = int(image.width * ratio + 1e-9), int(image.height * ratio + 1e-9)
    larger = image.resize(sides, FILTERS[filter_of(own)])
    left, top = round((larger.width - width) / 2), round((larger.height - height) / 2)
    return preprocess_image(larger.crop((left, top, left + width, top + height)), own)


def _over(colour: str) -> Callable[[Image.Image, Preprocess], np.ndarray]:
    def pixels(image: Image.Image, own: Preprocess) -> np.ndarray:
        if image.mode != "RGBA":
            return preprocess_image(image, own)
        ground = Image.new("RGBA", image.size, colour)
        ground.alpha_composite(image)
        return preprocess_image(_rgb(ground), own)

    return pixels


def _sampled(resample: Image.Resampling) -> Callable[[Image.Image, Preprocess], np.ndarray]:
    """Every pixel from those around its place alone, however much smaller the image becomes."""

    def pixels(image: Image.Image, own: Preprocess) -> np.ndarray:
        height, width = own.size
        ratio = min(image.width / width, image.height / height)
        left, top = (image.width - width * ratio) / 2, (image.height - height * ratio) / 2
        box = (left, top, left + width * ratio, top + height * ratio)
        return preprocess_image(
            _rgb(image).transform((width, height), Image.Transform.EXTENT, box, resample=resample), own
        )

    return pixels


def _rgb(image: Image.Image) -> Image.Image:
    return image.convert("RGB")


def text_mistakes(right: TextTokenizer) -> list[TextMistake]:
    """The mistakes that a client can make with the texts of a tokenizer."""
    tokenizer = right.info
    found = [TextMistake("no start token", lambda _, ids: _without(ids, tokenizer.sot_id, right))]
    if tokenizer.clean is not None:
        raw = right.uncleaned()
        found.append(TextMistake("text not cleaned (lower case, ftfy, white space)", lambda text, _: raw([text])[0]))
    if tokenizer.eot_id is not None:
        end = tokenizer.eot_id
        found += [
            TextMistake("no end token", lambda _, ids: _without(ids, end, right)),
            TextMistake("long text cut without the end token", lambda _, ids: _cut_off(ids, end, tokenizer)),
            TextMistake("another end token", lambda _, ids: [0 if index == end else index for index in ids]),
        ]
    return found


def _without(ids: Sequence[int], token: int | None, tokenizer: TextTokenizer) -> Sequence[int]:
    """Ids without a token; as many as before where the encoder takes one length."""
    if token is None or token not in ids:
        return ids
    left = [index for index in ids if index != token]
    missing = len(ids) - len(left) if not tokenizer.info.dynamic_sequence else 0
    return [*left, *[tokenizer.info.pad_id or 0] * missing]


def _cut_off(ids: Sequence[int], end: int, tokenizer: TokenizerInfo) -> Sequence[int]:
    """A full text that ends in a word."""
    if len(ids) < tokenizer.context_length or ids[-1] != end:
        return ids
    return [*ids[:-1], ids[-2]]
