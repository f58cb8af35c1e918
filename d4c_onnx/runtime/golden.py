"""Golden vectors: an image, a text, and the embeddings a bundle must give for them, for any client to check itself.

The image is drawn, not photographed: gradients, discs and stripes, so that no data set is touched.
"""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

import numpy as np
from PIL import Image

from d4c_onnx.files import write_json
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession

FOLDER = "golden"
TEXT = "a photo of a red boat on a lake."


def golden_image(height: int, width: int) -> Image.Image:
    """A drawn RGB test image."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.06).astype(float)
    stripes = (np.sin(x * 40 + y * 13) > 0.6) * 0.3
    channels = [x * (1 - disc) + 0.9 * disc, y * (1 - disc) + stripes, 1 - (x + y) / 2 * (1 - disc)]
    return Image.fromarray((np.clip(np.stack(channels, -1), 0, 1) * 255).astype(np.uint8))


def golden_input(preprocess: dict[str, Any]) -> np.ndarray:
    """pixel_values float32 [1, 3, H, W] of the golden image."""
    return preprocess_image(golden_image(*preprocess["size"]), preprocess)[None]


def write_golden(
    folder: Path,
    image_file: Path,
    text_file: Path,
    preprocess: dict[str, Any],
    input_ids: np.ndarray,
    tolerance: float,
    entries: Mapping[str, str] | None = None,
) -> None:
    """Run both encoders on the golden input and write what they answer.

    Args:
        input_ids: int64 [1, sequence] of `TEXT`, from the model's own tokenizer.
        tolerance: max abs difference another machine may show.
        entries: session config entries that the files are served with.
    """
    target = folder / FOLDER
    target.mkdir()
    golden_image(*preprocess["size"]).save(target / "image.png")
    vectors = {
        "image": "image.png",
        "text": TEXT,
        "input_ids": input_ids[0].tolist(),
        "image_embeds": EncoderSession(image_file, entries=entries).run(golden_input(preprocess))[0].tolist(),
        "text_embeds": EncoderSession(text_file, entries=entries).run(input_ids)[0].tolist(),
        "tolerance": tolerance,
    }
    write_json(target / "golden.json", vectors)


def read_golden(folder: Path) -> dict[str, Any]:
    """The golden vectors of a bundle."""
    content: dict[str, Any] = json.loads((folder / FOLDER / "golden.json").read_text("utf-8"))
    return content
