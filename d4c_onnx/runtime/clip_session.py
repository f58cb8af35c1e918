"""A bundle as a library: images and texts in, unit vectors out.

session = ClipSession("exported/mini-vit/w4a8")
session.similarity(["cat.jpg"], ["a photo of a cat.", "a photo of a ship."])  # float32 [1, 2]
"""

from collections.abc import Callable, Iterable, Iterator, Sequence
from functools import cached_property
from itertools import islice
from pathlib import Path
from typing import TypeVar

import numpy as np
from PIL import Image

from d4c_onnx.bundle import Bundle, open_bundle
from d4c_onnx.errors import BundleError, DatasetError
from d4c_onnx.runtime.images import MOST_PIXELS, ImageLike, read_image
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.vectors import unit

TEMPLATES = ("a photo of a {}.",)
OnBatch = Callable[[int], object]
T = TypeVar("T")


class ClipSession:
    """Both encoders of a bundle with their preprocessing and tokenizer; each is loaded when it is first used."""

    def __init__(
        self,
        bundle: Bundle | str | Path,
        *,
        provider: str = "cpu",
        threads: int = 0,
        batch: int = 32,
        most_pixels: int = MOST_PIXELS,
        exif_rotation: bool = False,
        verify: bool = True,
    ) -> None:
        """Open a bundle.

        Args:
            bundle: its folder, or an open one.
            provider: onnxruntime's: cpu, cuda or auto.
            threads: of each encoder; 0: onnxruntime's choice.
            batch: images or texts that go through an encoder together; no more than so many are in memory.
            most_pixels: an image of more is refused before it is decoded.
            exif_rotation: turn cameras' pictures upright first, which open_clip does not.
            verify: compare the files with the manifest's SHA-256, which reads all of them.

        Raises:
            BundleError: the folder is no bundle, or a file is missing, damaged or of a newer format.
        """
        self.bundle = bundle if isinstance(bundle, Bundle) else open_bundle(bundle, verify)
        self.batch = batch
        self._provider, self._threads = provider, threads
        self._most_pixels, self._exif_rotation = most_pixels, exif_rotation

    def embed_images(
        self, images: ImageLike | Iterable[ImageLike], batch: int | None = None, on_batch: OnBatch | None = None
    ) -> np.ndarray:
        """Unit vectors of images, which are read and dropped one by one.

        Args:
            images: paths, encoded bytes, uint8 arrays ([H, W], [H, W, 3] in RGB, [H, W, 4]) or pillow's.
            batch: instead of the session's.
            on_batch: told how many were embedded, after each batch.

        Returns:
            float32 [N, D].

        Raises:
            DatasetError: one cannot be read; the message says which.
        """
        alone = isinstance(images, str | Path | bytes | Image.Image)
        alone = alone or (isinstance(images, np.ndarray) and images.ndim < 4)
        several: Iterable[ImageLike] = [images] if alone else images  # type: ignore[list-item, assignment]
        pixels = (self._named(image, number) for number, image in enumerate(several))
        return self.embed_pixels((np.stack(some) for some in batches(pixels, batch or self.batch)), on_batch)

    def embed_pixels(self, batches: Iterable[np.ndarray], on_batch: OnBatch | None = None) -> np.ndarray:
        """Unit vectors, float32 [N, D], of pixel_values in batches, float32 [B, 3, H, W] each."""
        return self._embed(self._image, batches, on_batch)

    def embed_ids(self, batches: Iterable[np.ndarray], on_batch: OnBatch | None = None) -> np.ndarray:
        """Unit vectors, float32 [N, D], of input_ids in batches, int64 [B, sequence] each."""
        return self._embed(self._text, batches, on_batch)

    def embed_texts(
        self, texts: str | Iterable[str], batch: int | None = None, on_batch: OnBatch | None = None
    ) -> np.ndarray:
        """Unit vectors of texts; what is longer than the context is cut, as the model was trained.

        Returns:
            float32 [N, D].

        Raises:
            BundleError: the bundle has no tokenizer.
        """
        several = batches([texts] if isinstance(texts, str) else texts, batch or self.batch)
        return self.embed_ids(map(self.input_ids, several), on_batch)

    def embed_labels(self, labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> np.ndarray:
        """Prompt ensembling: for each label the mean of its templates' unit vectors, normalised; float32 [K, D].

        Args:
            templates: each with a `{}`, where the label goes.

        Raises:
            DatasetError: a template has no `{}`, or there is no label.
        """
        vectors = self.embed_texts(prompts(labels, templates))
        return label_embeds(vectors, len(labels))

    def similarity(self, images: ImageLike | Iterable[ImageLike], texts: str | Iterable[str]) -> np.ndarray:
        """Cosine of each image with each text, float32 [N, M]."""
        return self.embed_images(images) @ self.embed_texts(texts).T

    def zero_shot(
        self,
        images: ImageLike | Iterable[ImageLike],
        labels: Sequence[str],
        templates: Sequence[str] = TEMPLATES,
    ) -> np.ndarray:
        """How likely each label is for each image, float32 [N, K].

        Rows sum to 1, but for models with a bias (SigLIP's), which judge each label by itself.
        """
        return self.probabilities(self.embed_images(images) @ self.embed_labels(labels, templates).T)

    def probabilities(self, cosines: np.ndarray) -> np.ndarray:
        """What the model makes of cosines [N, K] of images with labels: a softmax, or a sigmoid where it has a bias."""
        model = self.bundle.manifest.model
        logits = cosines.astype(np.float64) * model.scale
        if model.logit_bias is not None:
            return (0.5 + 0.5 * np.tanh((logits + model.logit_bias) / 2)).astype(np.float32)
        weights = np.exp(logits - logits.max(-1, keepdims=True))
        return (weights / weights.sum(-1, keepdims=True)).astype(np.float32)

    def input_ids(self, texts: Sequence[str]) -> np.ndarray:
        """int64 [len(texts), sequence], as the text encoder takes them."""
        ids = self.tokenizer(list(texts))
        length = self._text.fixed_length
        if length is None or ids.shape[1] == length:
            return ids
        pad = self.bundle.manifest.tokenizer.pad_id or 0
        return np.pad(ids, ((0, 0), (0, length - ids.shape[1])), constant_values=pad)

    def encoders(self) -> dict[str, EncoderSession]:
        """Both encoders by their file's name, loaded."""
        return {self.bundle.image_encoder.name: self._image, self.bundle.text_encoder.name: self._text}

    @cached_property
    def _image(self) -> EncoderSession:
        return self._session(self.bundle.image_encoder)

    @cached_property
    def _text(self) -> EncoderSession:
        return self._session(self.bundle.text_encoder)

    @cached_property
    def tokenizer(self) -> TextTokenizer:
        """The bundle's."""
        return TextTokenizer(self.bundle.tokenizer, self.bundle.manifest.tokenizer)

    def _session(self, path: Path) -> EncoderSession:
        made = EncoderSession(path, self._provider, self._threads, entries=self.bundle.session_entries)
        made.check(self.bundle.manifest.io[path.name])
        return made

    def pixels(self, source: ImageLike) -> np.ndarray:
        """pixel_values float32 [3, H, W] of one image.

        Raises:
            DatasetError: it cannot be read.
        """
        image = read_image(source, self._most_pixels)
        return preprocess_image(image, self.bundle.manifest.preprocess, self._exif_rotation)

    def _named(self, source: ImageLike, number: int) -> np.ndarray:
        """Its pixels; an error says which one it is."""
        try:
            return self.pixels(source)
        except DatasetError as error:
            place = str(source) if isinstance(source, str | Path) else f"image {number}"
            raise DatasetError(f"{place}: {error}") from error

    def _embed(self, session: EncoderSession, batches: Iterable[np.ndarray], on_batch: OnBatch | None) -> np.ndarray:
        parts: list[np.ndarray] = []
        for batch in batches:
            try:
                parts.append(unit(session.run(np.ascontiguousarray(batch))).astype(np.float32, copy=False))
            except BundleError as error:
                raise BundleError(f"{self.bundle.path}: {error}") from error
            if on_batch is not None:
                on_batch(len(batch))
        return np.concatenate(parts) if parts else np.zeros((0, session.width), np.float32)


def prompts(labels: Sequence[str], templates: Sequence[str] = TEMPLATES) -> list[str]:
    """Each label in each template, label by label.

    Raises:
        DatasetError: a template has no `{}`, or there is no label.
    """
    odd = next((template for template in templates if "{}" not in template), None)
    if odd is not None or not templates:
        raise DatasetError(f"template {odd!r}: needs a {{}} where the label goes.")
    if not labels:
        raise DatasetError("no label: name at least one.")
    return [template.replace("{}", label) for label in labels for template in templates]


def label_embeds(text_embeds: np.ndarray, labels: int) -> np.ndarray:
    """Unit vectors of prompts, label by label, [labels * templates, D], as one of each label, [labels, D]."""
    return unit(text_embeds.reshape(labels, -1, text_embeds.shape[-1]).mean(1))


def batches(items: Iterable[T], size: int) -> Iterator[list[T]]:
    """Items, so many at a time."""
    left = iter(items)
    while some := list(islice(left, size)):
        yield some
