"""Golden input through whatever should answer it, and if it does not, which mistake is likeliest: the one comparison.

Bundles, packages and a client's own answers are judged by it.
"""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator
from dataclasses import dataclass
from pathlib import Path

import numpy as np
from PIL import Image

from d4c_onnx.bundle import GOLDEN
from d4c_onnx.errors import BundleError
from d4c_onnx.manifest import Preprocess
from d4c_onnx.manifest_file import GOLDEN_FOLDER
from d4c_onnx.runtime.golden import GoldenText, GoldenVectors, ids_sha256, pixels_sha256
from d4c_onnx.runtime.images import read_image
from d4c_onnx.runtime.mistakes import image_mistakes, text_mistakes
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.vectors import unit

Embed = Callable[[Iterable[np.ndarray]], np.ndarray]

_NEARER = 0.5  # a mistake is named where it explains at least so much of the distance


@dataclass(frozen=True, slots=True)
class Check:
    """One thing that was looked at.

    Attributes:
        name: what.
        ok: None: it is only told, and decides nothing.
        detail: a sentence.
    """

    name: str
    ok: bool | None
    detail: str


@dataclass(frozen=True, slots=True)
class Answers:
    """What a client of one's own gave for the golden images and texts, in their order: [N, D] each, or None."""

    images: np.ndarray | None = None
    texts: np.ndarray | None = None


@dataclass(frozen=True, slots=True)
class Subject:
    """What golden input goes through.

    Attributes:
        folder: holds golden/.
        preprocess: how its images become pixels.
        tokenizer: None: there is no file that could be asked.
        embed_pixels: batches float32 [B, 3, H, W] to unit vectors float32 [N, D]; None: it has no image tower.
        embed_ids: batches int64 [B, sequence], likewise.
    """

    folder: Path
    preprocess: Preprocess
    tokenizer: TextTokenizer | None
    embed_pixels: Embed | None
    embed_ids: Embed | None

    def images(self, golden: GoldenVectors) -> list[Image.Image]:
        """The golden images."""
        return [read_image(self.folder / GOLDEN_FOLDER / Path(one.file).name) for one in golden.images]

    def pixels(self, golden: GoldenVectors, preprocess: Preprocess | None = None) -> list[np.ndarray]:
        """Their pixel_values, float32 [3, H, W] each, as this preprocessing makes them; None: the subject's own."""
        return [preprocess_image(image, preprocess or self.preprocess) for image in self.images(golden)]

    def seen(self, pixels: Iterable[np.ndarray]) -> np.ndarray:
        """Unit vectors of pixel_values float32 [3, H, W] each."""
        assert self.embed_pixels is not None
        return self.embed_pixels(one[None] for one in pixels)

    def read(self, rows: Iterable[Iterable[int]]) -> np.ndarray:
        """Unit vectors of rows of ids."""
        assert self.embed_ids is not None
        return self.embed_ids(np.array([list(row)], np.int64) for row in rows)


def check_pixels(golden: GoldenVectors, pixels: list[np.ndarray]) -> Check:
    """Whether today's pixels are those of the golden images."""
    digests = [one.pixels_sha256 for one in golden.images]
    same = sum(not digest or pixels_sha256(one) == digest for one, digest in zip(pixels, digests, strict=True))
    detail = f"{same} of {len(pixels)} golden images give the very pixels"
    # other releases of pillow may round a pixel otherwise: what counts are the embeddings
    return Check("pixels", True if same == len(pixels) else None, detail)


def check_ids(golden: GoldenVectors, name: str, tokenizer: TextTokenizer | None) -> Check:
    """Whether today's ids are those of the golden texts."""
    if tokenizer is None or (golden.older and tokenizer.info.clean is None):
        return Check(name, None, "no tokenizer.json that could be asked: ids are the client's")
    wrong = [number for number, one in enumerate(golden.texts) if not _same_ids(tokenizer, one)]
    if wrong:
        numbers = ", ".join(str(number) for number in wrong)
        detail = f"golden texts {numbers} get other ids: tokenizer.json or the manifest changed"
        return Check(name, False, detail)
    return Check(name, True, f"{len(golden.texts)} golden texts get the very ids")


def _same_ids(tokenizer: TextTokenizer, one: GoldenText) -> bool:
    ids = tokenizer([one.text])[0].tolist()
    if not tokenizer.info.dynamic_sequence:  # towers of a fixed length get the rest as padding
        ids += [tokenizer.info.pad_id or 0] * (len(one.input_ids) - len(ids))
    return ids == list(one.input_ids) and one.ids_sha256 in ("", ids_sha256(ids))


def check_embeddings(golden: GoldenVectors, tower: str, name: str, found: np.ndarray) -> Check:
    """Embeddings of one tower against the golden ones.

    Args:
        name: whose they are, for the check.

    Raises:
        BundleError: there are more or fewer of them, or they have another length.
    """
    embeds = [one.embeds for one in (golden.images if tower == "image" else golden.texts)]
    if found.shape != (len(embeds), len(embeds[0])):
        raise BundleError(
            f"the {name} have the shape {list(found.shape)}, not {[len(embeds), len(embeds[0])]}: "
            f"one row for each entry of {GOLDEN}."
        )
    distances = [golden.distance(row, right) for row, right in zip(found, embeds, strict=True)]
    worst = max(distances)
    told = f"{worst:.2g} from the golden ones at most, allowed {golden.tolerance[tower]:.2g}"
    return Check(name, bool(worst <= golden.tolerance[tower]), told)  # False for NaN


def likeliest_mistake(
    subject: Subject,
    golden: GoldenVectors,
    tower: str,
    answers: np.ndarray | None = None,
    *,
    own: np.ndarray | None = None,
) -> str | None:
    """The mistake whose embeddings are nearest to what came out.

    Args:
        answers: a client's [N, D], which a mistake of its own would explain; None: the subject's own, and golden
            vectors that were made with other settings than those of its manifest would.
        own: what the subject answers, where it was asked already.
    """
    image = tower == "image"
    right = np.array([one.embeds for one in (golden.images if image else golden.texts)])
    wanted = unit(right if answers is None else answers)
    if own is None:
        own = subject.seen(subject.pixels(golden)) if image else subject.read(one.input_ids for one in golden.texts)
    candidates = _seen(subject, golden) if image else _read(subject, golden)
    nearest, name = _NEARER * float(np.linalg.norm(own - wanted)), None
    for mistake, embeds in candidates:
        distance = float(np.linalg.norm(embeds - wanted))
        if distance < nearest:
            nearest, name = distance, mistake
    return name


def _seen(subject: Subject, golden: GoldenVectors) -> Iterator[tuple[str, np.ndarray]]:
    """Each mistake with images, and what comes of it."""
    images = subject.images(golden)
    for mistake in image_mistakes(subject.preprocess):
        yield mistake.name, subject.seen(mistake.pixels(image, subject.preprocess) for image in images)


def _read(subject: Subject, golden: GoldenVectors) -> Iterator[tuple[str, np.ndarray]]:
    """Each mistake with texts, and what comes of it."""
    for mistake in text_mistakes(subject.tokenizer) if subject.tokenizer is not None else ():
        yield mistake.name, subject.read(mistake.ids(one.text, one.input_ids) for one in golden.texts)
