"""The page's own pixels, by node, beside pillow's: it has to resize, crop and pad as the model's preprocessing does."""

import json
import shutil
import subprocess
from importlib.resources import files

import numpy as np
import pytest
from PIL import Image

from d4c_onnx.manifest import Preprocess
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.web_page import BROWSER

NODE = shutil.which("node")
SIZES = [(16, 9), (9, 16), (448, 225), (30, 7), (7, 30), (29, 29), (8, 8), (3, 5), (200, 11), (1, 40)]
CONFIGS = [
    Preprocess(size, (0.0,) * 3, (1.0,) * 3, interpolation, mode, fill_color=200)
    for size in ((8, 8), (8, 6), (5, 9), (21, 21))
    # releases of pillow differ in which side goes first, where both change: no filter that overshoots
    for mode, interpolation in (("shortest", "bicubic"), ("longest", "bilinear"), ("squash", "bilinear"))
]


def _image(width: int, height: int) -> Image.Image:
    return Image.fromarray(np.random.default_rng(width).integers(0, 256, (height, width, 3), np.uint8))


@pytest.mark.skipif(NODE is None, reason="no node here")
def test_pixels_of_the_page_are_pillows() -> None:
    """All of it but the browser's decoder, on pictures whose sides meet every kind of rounding."""
    script = (files("d4c_onnx.web_page") / BROWSER).read_text("utf-8")
    own = script[script.index("// pixel_values float32") :]
    asked = [
        {
            "picture": {"width": width, "height": height, "rgb": np.asarray(_image(width, height)).ravel().tolist()},
            "config": {
                "size": config.size,
                "mean": config.mean,
                "std": config.std,
                "resize_mode": config.resize_mode,
                "interpolation": config.interpolation,
                "fill_color": config.fill_color,
            },
        }
        for config in CONFIGS
        for width, height in SIZES
    ]
    run = """
decoded = async (picture) => picture;
const asked = JSON.parse(require("node:fs").readFileSync(0));
Promise.all(asked.map(({ picture, config }) => pixelValues(picture, config))).then((found) =>
  console.log(JSON.stringify(found.map((values) => Array.from(values, (value) => Math.round(255 * value))))));
"""
    done = subprocess.run(
        [str(NODE), "-e", own + run], input=json.dumps(asked), capture_output=True, text=True, check=True
    )
    cases = [(config, size) for config in CONFIGS for size in SIZES]
    for (config, size), found in zip(cases, json.loads(done.stdout), strict=True):
        expected = 255 * preprocess_image(_image(*size), config).ravel()
        np.testing.assert_allclose(found, expected, atol=2.01, err_msg=f"{size} as {config}")
