"""pixel_values are open_clip's own, bit by bit, for images of every mode, as files have them."""

import io
import warnings
from dataclasses import replace
from typing import Any

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from open_clip.transform import image_transform
from PIL import Image

from d4c_onnx.errors import DatasetError
from d4c_onnx.evaluation.datasets import LabelledImages
from d4c_onnx.evaluation.encoded import InMemory
from d4c_onnx.manifest import Preprocess
from d4c_onnx.runtime.mistakes import image_mistakes
from d4c_onnx.runtime.preprocess import filter_of, preprocess_image

CONFIG = Preprocess(size=(48, 48), mean=(0.48, 0.46, 0.41), std=(0.27, 0.26, 0.28))
CONFIGS = [
    CONFIG,
    replace(CONFIG, interpolation="bilinear"),
    replace(CONFIG, size=(48, 32), interpolation="bilinear"),
    replace(CONFIG, size=(33, 61)),
    replace(CONFIG, resize_mode="squash"),
    replace(CONFIG, size=(40, 64), resize_mode="squash", interpolation="bilinear"),
    replace(CONFIG, resize_mode="longest"),
    replace(CONFIG, size=(40, 64), resize_mode="longest", fill_color=90, interpolation="bilinear"),
]


def _expected(image: Image.Image, config: Preprocess) -> np.ndarray:
    """What open_clip makes of it."""
    size: Any = config.size if config.size[0] != config.size[1] else config.size[0]
    transform = image_transform(
        size,
        is_train=False,
        mean=config.mean,
        std=config.std,
        resize_mode=config.resize_mode,
        interpolation=config.interpolation,
        fill_color=config.fill_color,
    )
    return transform(image).numpy()


def _file(image: Image.Image, kind: str, **options: Any) -> bytes:
    buffer = io.BytesIO()
    image.save(buffer, kind, **options)
    return buffer.getvalue()


def _photo(width: int = 170, height: int = 120) -> Image.Image:
    rng = np.random.default_rng(width * 1000 + height)
    coarse = Image.fromarray(rng.integers(0, 256, (9, 13, 3), dtype=np.uint8))
    return coarse.resize((width, height), Image.Resampling.BICUBIC)


def _cut_out(mode: str = "RGBA") -> Image.Image:
    image = _photo().convert(mode.removesuffix("A"))
    alpha = Image.fromarray(np.random.default_rng(3).integers(0, 256, (4, 4), dtype=np.uint8))
    image.putalpha(alpha.resize(image.size, Image.Resampling.NEAREST))
    return image


def _quarter_turned() -> bytes:
    exif = Image.Exif()
    exif[0x112] = 6
    return _file(_photo(), "JPEG", exif=exif)


_FRAMES = {"save_all": True, "append_images": [_photo().rotate(180).quantize(16)]}
_GREY = np.asarray(_photo().convert("L"))
FILES = {
    "RGB PNG": _file(_photo(), "PNG"),
    "JPEG": _file(_photo(), "JPEG"),
    "RGBA PNG": _file(_cut_out(), "PNG"),
    "RGBA WebP": _file(_cut_out(), "WEBP", lossless=True),
    "LA PNG": _file(_cut_out("LA"), "PNG"),
    "palette PNG": _file(_photo().quantize(32), "PNG"),
    "palette PNG, a colour transparent": _file(_photo().quantize(32), "PNG", transparency=3),
    "palette PNG, colours half transparent": _file(_cut_out().quantize(32), "PNG"),
    "GIF": _file(_photo().quantize(64), "GIF"),
    "animated GIF": _file(_photo().quantize(16), "GIF", **_FRAMES),
    "animated WebP": _file(_cut_out(), "WEBP", lossless=True, save_all=True, append_images=[_photo()]),
    "1-bit PNG": _file(_photo().convert("1"), "PNG"),
    "grey PNG": _file(_photo().convert("L"), "PNG"),
    "grey PNG, a grey transparent": _file(_photo().convert("L"), "PNG", transparency=7),
    "CMYK JPEG": _file(_photo().convert("CMYK"), "JPEG"),
    "CMYK TIFF": _file(_photo().convert("CMYK"), "TIFF"),
    "float TIFF": _file(Image.fromarray(_GREY.astype(np.float32)), "TIFF"),
    "32-bit TIFF with values of a byte": _file(Image.fromarray(_GREY.astype(np.int32)), "TIFF"),
    "a quarter turned by EXIF": _quarter_turned(),
    "1 x 1": _file(_photo(1, 1), "PNG"),
    "1 x 1 RGBA": _file(_cut_out().crop((0, 0, 1, 1)), "PNG"),
    "2000 x 3": _file(_photo(2000, 3), "PNG"),
    "3 x 2000, palette": _file(_photo(3, 2000).quantize(8), "PNG"),
    "as large as asked for": _file(_cut_out().resize((48, 48)), "PNG"),
}


def _open(blob: bytes) -> Image.Image:
    return Image.open(io.BytesIO(blob))


@pytest.mark.parametrize("blob", FILES.values(), ids=FILES)
def test_pixels_are_open_clips(blob: bytes) -> None:
    for config in CONFIGS:
        if config.resize_mode == "longest" and max(_open(blob).size) == 2000:
            continue  # open_clip fails there
        source = _open(blob)
        if config.resize_mode == "longest" and source.mode in ("P", "CMYK"):
            source = source.convert("RGBA").convert("RGB")  # open_clip would pad with some colour of the palette
        got = preprocess_image(_open(blob), config)
        assert got.dtype == np.float32
        with warnings.catch_warnings(action="ignore"):  # pillow's, of a palette's transparency, which goes lost
            expected = _expected(source, config)
        assert np.array_equal(got, expected)


@given(st.integers(1, 130), st.integers(1, 130), st.sampled_from(CONFIGS), st.sampled_from(["RGB", "RGBA", "1", "L"]))
@settings(max_examples=60, deadline=None)
def test_any_size(width: int, height: int, config: Preprocess, mode: str) -> None:
    image = _photo(width, height).convert(mode)
    try:
        expected = _expected(image, config)
    except ValueError:  # a strip so thin that open_clip pads nothing
        assert config.resize_mode == "longest"
    else:
        assert np.array_equal(preprocess_image(image, config), expected)


@pytest.mark.parametrize("mode", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("kind", ["PNG", "TIFF"])
def test_16_bit_grey_is_scaled(kind: str, mode: str) -> None:
    """open_clip makes it white: all above 255 is."""
    config = replace(CONFIG, resize_mode=mode)
    image = _open(_file(Image.fromarray(_GREY.astype(np.uint16) * 257), kind))
    assert image.mode != "L"
    assert np.array_equal(preprocess_image(image, config), _expected(Image.fromarray(_GREY), config))
    if kind == "PNG":  # older pillow resizes no 16-bit TIFF
        assert np.allclose(_expected(image, CONFIG)[:, 8:-8, 8:-8], _white(), atol=0.2)


def _white() -> np.ndarray:
    return ((1 - np.array(CONFIG.mean)) / np.array(CONFIG.std))[:, None, None]


def test_16_bit_as_older_pillow_reads_it() -> None:
    grey = Image.fromarray(_GREY)
    wide = Image.fromarray(_GREY.astype(np.int32) * 257)
    assert wide.mode == "I"
    assert np.array_equal(preprocess_image(wide, CONFIG), _expected(grey, CONFIG))
    dark = Image.fromarray(np.full((50, 50), 200, np.int32))
    dark.format = "PNG"  # 200 of 65535, not of 255
    assert preprocess_image(dark, CONFIG).max() < -1.4


def test_strips_that_open_clip_cannot_pad() -> None:
    pixels = preprocess_image(_photo(2000, 3), replace(CONFIG, resize_mode="longest"))
    rows = np.ptp(pixels, axis=(0, 2)) > 1
    assert rows.tolist() == [row == 23 for row in range(48)]


def test_a_very_long_strip_costs_no_memory() -> None:
    """Resized as a whole it would have 150 million pixels; its middle is that of a shorter one."""
    strip = np.random.default_rng(0).integers(0, 256, (1, 65000, 3), dtype=np.uint8)
    got = preprocess_image(Image.fromarray(strip), CONFIG)
    expected = preprocess_image(Image.fromarray(strip[:, 32000:33000]), CONFIG)
    assert np.abs(got - expected).max() <= 1.01 / 255 / min(CONFIG.std)


def test_palette_with_alpha_is_not_averaged() -> None:
    image = Image.merge("LA", [Image.new("L", (60, 60), 40), Image.new("L", (60, 60), 255)]).convert("PA")
    assert np.array_equal(preprocess_image(image, CONFIG), _expected(image.convert("RGBA"), CONFIG))


def test_exif_turns_on_request_only() -> None:
    lying, upright = _open(_quarter_turned()), _open(_quarter_turned()).transpose(Image.Transpose.ROTATE_270)
    assert np.array_equal(preprocess_image(lying, CONFIG, exif_rotation=True), _expected(upright, CONFIG))
    assert not np.array_equal(preprocess_image(lying, CONFIG), _expected(upright, CONFIG))
    assert np.array_equal(preprocess_image(_photo(), CONFIG, exif_rotation=True), _expected(_photo(), CONFIG))


def test_what_cannot_become_rgb_is_refused() -> None:
    with pytest.raises(DatasetError, match="mode La cannot become RGB"):
        preprocess_image(_cut_out("LA").convert("La"), CONFIG)
    with pytest.raises(DatasetError, match="0 x 5 pixels"):
        preprocess_image(Image.new("RGB", (0, 5)), CONFIG)


def test_data_sets_hand_out_images_as_their_files_have_them() -> None:
    """evaluate and the real control see what open_clip's own transform would."""
    count = len(FILES)
    images = LabelledImages("set", ("",), np.zeros(count, np.int64), InMemory([*FILES.values()]), [*FILES])
    modes = [image.mode for batch in images.batches(5) for image in batch]
    assert modes == [_open(blob).mode for blob in FILES.values()]
    broken = replace(images, encoded=InMemory([FILES["RGB PNG"][:200]]), places=["x.png"])
    with pytest.raises(DatasetError, match=r"set, x\.png: not an image"):
        list(next(broken.batches(1)))


@pytest.mark.parametrize(
    ("changes", "used"),
    [
        ({"interpolation": "box"}, "box"),
        ({"interpolation": "random"}, "bicubic"),
        ({"interpolation": "bilinear", "size": (48, 32)}, "bicubic"),
        ({"interpolation": "bilinear", "size": (48, 32), "resize_mode": "squash"}, "bilinear"),
    ],
)
def test_the_filter_that_is_used_is_no_mistake(changes: dict[str, object], used: str) -> None:
    config = replace(CONFIG, **changes)  # type: ignore[arg-type]
    assert filter_of(config) == used
    names = {mistake.name for mistake in image_mistakes(config)}
    assert f"resized with {used}" not in names
    assert {f"resized with {name}" for name in {"bicubic", "bilinear", "nearest"} - {used}} <= names
