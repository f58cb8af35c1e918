"""Golden vectors: images, texts, and the embeddings a bundle must give for them, for any client to check itself.

They are made so that a client's usual mistakes show: a photo that is not square (crop, squeeze), a portrait whose alpha
band hides colours, a small grey image (it grows, and filters show most), and texts with accents, emoji, curly quotes,
two lines, and more words than the context holds. The images are dead leaves, so no data set is touched.

What a client gets is compared as unit vectors, by the length of their difference; how much of it another machine may
show, and no mistake stays below, is measured when the vectors are written.
"""

import hashlib
import shutil
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import cache
from pathlib import Path

import numpy as np
from PIL import Image

from d4c_onnx.bundle import GOLDEN, TOKENIZER
from d4c_onnx.dead_leaves import dead_leaves
from d4c_onnx.files import write_json
from d4c_onnx.manifest import LONGEST_CONTEXT, Preprocess, TokenizerInfo
from d4c_onnx.manifest_file import GOLDEN_FOLDER, file_name
from d4c_onnx.runtime.mistakes import MEASURED, image_mistakes, text_mistakes
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.vectors import unit
from d4c_onnx.untrusted_json import Node, integer, number, positive, read_json, sequence, sha256_text, text

IMAGES = _PHOTO, _PORTRAIT, _GREY = "photo.png", "portrait.png", "grey.png"
_LONGEST_TEXT = 16 * LONGEST_CONTEXT
_SEED = 20


@dataclass(frozen=True, slots=True)
class GoldenImage:
    """An image and its embedding.

    Attributes:
        file: its name, in the golden folder.
        pixels_sha256: of pixel_values, float32 [3, H, W] in little-endian bytes; empty in older bundles. Another pillow
            may round a resized pixel otherwise, which no embedding shows.
        embeds: what the image encoder answers.
    """

    file: str
    pixels_sha256: str
    embeds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GoldenText:
    """A text, its ids (int64, without padding where none is needed), their SHA-256, and its embedding."""

    text: str
    input_ids: tuple[int, ...]
    ids_sha256: str
    embeds: tuple[float, ...]


@dataclass(frozen=True, slots=True)
class GoldenVectors:
    """What a client can check itself against.

    Attributes:
        images, texts: with what they must give.
        tolerance: by tower: the length of a difference of unit vectors that another machine may show.
        unseen: mistakes that stay below it with this model, by name.
        older: whether it is the form with one image of the model's own size and one text, whose tolerance is about the
            largest difference of a number.
    """

    images: tuple[GoldenImage, ...]
    texts: tuple[GoldenText, ...]
    tolerance: Mapping[str, float]
    unseen: tuple[str, ...] = ()
    older: bool = False

    def distance(self, found: np.ndarray, embeds: Sequence[float]) -> float:
        """How far an embedding [D] is from a golden one, in what `tolerance` is about."""
        difference = unit(found) - unit(np.asarray(embeds))
        return float(np.abs(difference).max() if self.older else np.linalg.norm(difference))


@dataclass(frozen=True, slots=True)
class Bounds:
    """Of a tolerance: at least what other kernels make of the same integers, at most what nobody would miss."""

    least: float
    most: float

    def below(self, nearest: float) -> float:
        """The tolerance where the nearest mistake is that far away."""
        return float(f"{min(max(nearest / 2, self.least), self.most):.3g}")


# In FP32: other kernels sum in another order.
FP32_BOUNDS = Bounds(least=1e-4, most=1e-3)


@cache
def golden_images(height: int, width: int) -> Mapping[str, Image.Image]:
    """The images for a model of that input size, by file name."""

    def leaves(number: int, high: float, wide: float) -> np.ndarray:
        size = max(8, round(high * height)), max(8, round(wide * width))
        return (dead_leaves(1, size, _SEED, number)[0].transpose(1, 2, 0) * 255).round().astype(np.uint8)

    colours = leaves(1, 1.8, 1.2)
    y, x = np.mgrid[-1 : 1 : colours.shape[0] * 1j, -1 : 1 : colours.shape[1] * 1j]
    alpha = np.clip((1.1 - np.hypot(x, y)) * 400, 0, 255).astype(np.uint8)
    return {
        _PHOTO: Image.fromarray(leaves(0, 1.3, 1.9)),
        _PORTRAIT: Image.fromarray(np.dstack([colours, alpha])),
        _GREY: Image.fromarray(leaves(2, 0.6, 0.45)).convert("L"),
    }


def golden_texts(context_length: int) -> tuple[str, ...]:
    """The texts for a model of that context."""
    words = ("red", "boats", "and", "old", "houses", "by", "the", "quiet", "harbour", "under", "dark", "clouds")
    return (
        "Une Crème brûlée à Zürich, servie près de l'église",
        "two happy dogs 🐕🐕 on a sunny beach 🏖",
        "“It’s the cat’s favourite chair” – said Anna…",
        "A painting of " + " ".join(words[number % len(words)] for number in range(context_length + 8)),
        "A lighthouse\non a cliff   at  Night",
    )


def write_golden(
    folder: Path,
    encoders: tuple[Path, Path],
    preprocess: Preprocess,
    texts: Sequence[tuple[str, Sequence[int]]],
    bounds: Bounds,
    tokenizer: TokenizerInfo,
    *,
    entries: Mapping[str, str] | None = None,
    images_from: Path | None = None,
) -> None:
    """Run both encoders on the golden input and write what they answer.

    Args:
        folder: a bundle's that is being made; its tokenizer.json is there already, where it has one.
        encoders: image and text.
        texts: with their ids, from the model's own tokenizer.
        bounds: of the tolerance.
        tokenizer: what the manifest says of it.
        entries: session config entries that the files are served with.
        images_from: the golden folder of another bundle of the model, whose images are copied.
    """
    target = folder / GOLDEN_FOLDER
    target.mkdir()
    for name in IMAGES:
        if images_from is not None and (images_from / name).is_file():
            shutil.copyfile(images_from / name, target / name)
        else:
            golden_images(*preprocess.size)[name].save(target / name)
    image, text = (EncoderSession(file, entries=entries) for file in encoders)

    def see(pixels: np.ndarray) -> np.ndarray:
        return image.run(np.ascontiguousarray(pixels[None]))[0]

    def read(ids: Sequence[int]) -> np.ndarray:
        return text.run(np.array([ids], np.int64))[0]

    pixels = {name: _pixels(target / name, preprocess) for name in IMAGES}
    embeds = {name: see(values) for name, values in pixels.items()}
    seen = _image_distances(target / _PORTRAIT, preprocess, see, embeds[_PORTRAIT])
    answers = [read(ids) for _, ids in texts]
    heard = _text_distances(folder, tokenizer, texts, read, answers)
    tolerance = {"image": bounds.below(min(seen.values())), "text": bounds.below(min(heard.values(), default=np.inf))}
    unseen = [name for name, value in seen.items() if value <= tolerance["image"]]
    unseen += [name for name, value in heard.items() if value <= tolerance["text"]]
    content = {
        "version": 2,
        "images": [
            {"file": name, "pixel_values_sha256": pixels_sha256(pixels[name]), "image_embeds": embeds[name].tolist()}
            for name in pixels
        ],
        "texts": [
            {"text": words, "input_ids": list(ids), "input_ids_sha256": ids_sha256(ids), "text_embeds": answer.tolist()}
            for (words, ids), answer in zip(texts, answers, strict=True)
        ],
        "tolerance": tolerance,
        "unseen": unseen,
    }
    write_json(folder / GOLDEN, content)


def pixels_sha256(pixels: np.ndarray) -> str:
    """Of pixel_values, float32 [3, H, W]."""
    return hashlib.sha256(np.ascontiguousarray(pixels, "<f4").tobytes()).hexdigest()


def ids_sha256(ids: Sequence[int]) -> str:
    """Of one text's input_ids as int64."""
    return hashlib.sha256(np.array(ids, "<i8").tobytes()).hexdigest()


def _pixels(file: Path, preprocess: Preprocess) -> np.ndarray:
    with Image.open(file) as image:
        return preprocess_image(image, preprocess)


def _image_distances(
    file: Path, preprocess: Preprocess, see: Callable[[np.ndarray], np.ndarray], right: np.ndarray
) -> dict[str, float]:
    """How far each mistake that must show leads away, on one image: large encoders take seconds for each."""
    with Image.open(file) as image:
        return {
            one.name: float(np.linalg.norm(unit(see(one.pixels(image, preprocess))) - unit(right)))
            for one in image_mistakes(preprocess)
            if one.kind in MEASURED
        }


def _text_distances(
    folder: Path,
    tokenizer: TokenizerInfo,
    texts: Sequence[tuple[str, Sequence[int]]],
    read: Callable[[Sequence[int]], np.ndarray],
    right: Sequence[np.ndarray],
) -> dict[str, float]:
    """How far each mistake leads away, on that text which shows it best; without those that change no id."""
    found: dict[str, float] = {}
    file = folder / TOKENIZER
    for one in text_mistakes(TextTokenizer(file, tokenizer)) if file.is_file() else ():
        for (words, ids), answer in zip(texts, right, strict=True):
            wrong = one.ids(words, ids)
            if tuple(wrong) != tuple(ids):
                distance = float(np.linalg.norm(unit(read(wrong)) - unit(answer)))
                found[one.name] = max(distance, found.get(one.name, 0.0))
    return found


def read_golden(folder: Path) -> GoldenVectors:
    """The golden vectors of a bundle, of today's form or of the older one.

    Raises:
        BundleError: there are none, or a field is not what it may be.
    """
    top = read_json(folder / GOLDEN)
    if isinstance(top.value, dict) and "version" not in top.value:
        return _older(top)
    top.take("version", integer(2, 2))
    tolerance = top.take("tolerance", lambda node: {name: node.take(name, positive) for name in ("image", "text")})
    images, texts = top.take("images", sequence(_image)), top.take("texts", sequence(_text))
    widths = {len(one.embeds) for one in images} | {len(one.embeds) for one in texts}
    if not images or not texts or len(widths) != 1:
        raise top.wrong("images and texts with embeddings of one length")
    return GoldenVectors(
        images=images,
        texts=texts,
        tolerance=tolerance,
        unseen=top.take("unseen", sequence(text), ()),
    )


def _older(top: Node) -> GoldenVectors:
    """One image, one text."""
    tolerance = top.take("tolerance", positive)
    ids = top.take("input_ids", _ids)
    return GoldenVectors(
        images=(GoldenImage(top.take("image", file_name), "", top.take("image_embeds", _vector)),),
        texts=(GoldenText(top.take("text", text), ids, "", top.take("text_embeds", _vector)),),
        tolerance={"image": tolerance, "text": tolerance},
        older=True,
    )


def _image(node: Node) -> GoldenImage:
    digest = node.take("pixel_values_sha256", sha256_text)
    return GoldenImage(node.take("file", file_name), digest, node.take("image_embeds", _vector))


def _text(node: Node) -> GoldenText:
    digest = node.take("input_ids_sha256", sha256_text)
    words = node.take("text", _words)
    return GoldenText(words, node.take("input_ids", _ids), digest, node.take("text_embeds", _vector))


def _words(node: Node) -> str:
    """A text for a tokenizer, two lines perhaps; nobody prints it."""
    if not isinstance(node.value, str) or len(node.value) > _LONGEST_TEXT:
        raise node.wrong(f"text of at most {_LONGEST_TEXT} characters")
    try:
        node.value.encode()
    except UnicodeEncodeError as error:
        raise node.wrong("text without lone surrogates") from error
    return node.value


_ids: Callable[[Node], tuple[int, ...]] = sequence(integer(0, 2**31 - 1))
_vector: Callable[[Node], tuple[float, ...]] = sequence(number)
