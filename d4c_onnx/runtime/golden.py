"""Golden vectors: an image, a text, and the embeddings a bundle must give for them, for any client to check itself.

The image is drawn, not photographed: gradients, discs and stripes, so that no data set is touched.
"""

from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from d4c_onnx.bundle import GOLDEN
from d4c_onnx.files import write_json
from d4c_onnx.manifest import Preprocess
from d4c_onnx.manifest_file import GOLDEN_FOLDER, file_name
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.untrusted_json import integer, number, positive, read_json, sequence, text

TEXT = "a photo of a red boat on a lake."


@dataclass(frozen=True, slots=True)
class GoldenVectors:
    """What a client can check itself against.

    Attributes:
        image: the file's name, in the bundle's golden folder.
        text, input_ids: a text and its ids.
        image_embeds, text_embeds: what the encoders answer.
        tolerance: max abs difference that another machine may show.
    """

    image: str
    text: str
    input_ids: tuple[int, ...]
    image_embeds: tuple[float, ...]
    text_embeds: tuple[float, ...]
    tolerance: float


def golden_image(height: int, width: int) -> Image.Image:
    """A drawn RGB test image."""
    y, x = np.mgrid[0 : 1 : height * 1j, 0 : 1 : width * 1j]
    disc = ((x - 0.6) ** 2 + (y - 0.4) ** 2 < 0.06).astype(float)
    stripes = (np.sin(x * 40 + y * 13) > 0.6) * 0.3
    channels = [x * (1 - disc) + 0.9 * disc, y * (1 - disc) + stripes, 1 - (x + y) / 2 * (1 - disc)]
    return Image.fromarray((np.clip(np.stack(channels, -1), 0, 1) * 255).astype(np.uint8))


def golden_input(preprocess: Preprocess) -> np.ndarray:
    """pixel_values float32 [1, 3, H, W] of the golden image."""
    return preprocess_image(golden_image(*preprocess.size), preprocess)[None]


def write_golden(
    folder: Path,
    image_file: Path,
    text_file: Path,
    preprocess: Preprocess,
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
    target = folder / GOLDEN_FOLDER
    target.mkdir()
    golden_image(*preprocess.size).save(target / "image.png")
    image = EncoderSession(image_file, entries=entries).run(golden_input(preprocess))[0]
    prompt = EncoderSession(text_file, entries=entries).run(input_ids)[0]
    vectors = GoldenVectors(
        "image.png", TEXT, tuple(input_ids[0].tolist()), tuple(image.tolist()), tuple(prompt.tolist()), tolerance
    )
    write_json(folder / GOLDEN, asdict(vectors))


def read_golden(folder: Path) -> GoldenVectors:
    """The golden vectors of a bundle.

    Raises:
        BundleError: there are none, or a field is not what it may be.
    """
    top = read_json(folder / GOLDEN)
    return GoldenVectors(
        image=top.take("image", file_name),
        text=top.take("text", text),
        input_ids=top.take("input_ids", sequence(integer(0))),
        image_embeds=top.take("image_embeds", sequence(number)),
        text_embeds=top.take("text_embeds", sequence(number)),
        tolerance=top.take("tolerance", positive),
    )
