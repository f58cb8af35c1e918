"""One or two bundles of a model behind batchers: the one that is served, and its FP32 original to compare it with."""

from __future__ import annotations

import asyncio
import os
from collections.abc import AsyncIterator, Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import asynccontextmanager
from dataclasses import dataclass

import numpy as np

from d4c_onnx.errors import BundleError, DatasetError
from d4c_onnx.runtime.clip_session import ClipSession, label_embeds, prompts
from d4c_onnx.serving.batcher import Batcher, Encoded
from d4c_onnx.serving.limits import Limits
from d4c_onnx.serving.meters import Meters
from d4c_onnx.serving.reading import Question
from d4c_onnx.serving.refused import Refused


@dataclass(frozen=True, slots=True)
class Scores:
    """What one bundle makes of a question.

    Attributes:
        name: the bundle's width, such as w4a8.
        scores: float32 [images, labels].
        image_milliseconds, text_milliseconds: that its encoders took for the batches of this question.
    """

    name: str
    scores: np.ndarray
    image_milliseconds: float
    text_milliseconds: float


class _Behind:
    """A bundle behind its batchers."""

    def __init__(self, session: ClipSession, executor: ThreadPoolExecutor, limits: Limits, meters: Meters) -> None:
        self.session, self.name = session, session.bundle.manifest.bits
        self.image, self.text = (
            self._batcher(encoder, encode, executor, limits, meters)
            for encoder, encode in (("image", self._images), ("text", self._texts))
        )

    def _batcher(
        self,
        encoder: str,
        encode: Callable[[list], np.ndarray],
        executor: ThreadPoolExecutor,
        limits: Limits,
        meters: Meters,
    ) -> Batcher:
        batcher = Batcher(
            encode,
            executor,
            most=limits.batch,
            window_seconds=limits.window_seconds,
            waiting=limits.waiting,
            on_batch=meters.on_batch(self.name, encoder),
        )
        meters.watch(self.name, encoder, lambda: batcher.waiting)
        return batcher

    def _images(self, pixels: list[np.ndarray]) -> np.ndarray:
        return self.session.embed_pixels([np.stack(pixels)])

    def _texts(self, texts: list[str]) -> np.ndarray:
        return self.session.embed_texts(texts, batch=len(texts))

    async def scores(self, pixels: list[np.ndarray], question: Question) -> Scores:
        seen = await self.image(pixels)
        read = await self.text(prompts(question.labels, question.templates))
        cosines = seen.vectors @ label_embeds(read.vectors, len(question.labels)).T
        return Scores(self.name, self.session.probabilities(cosines), seen.milliseconds, read.milliseconds)


class Served:
    """What the paths ask: encoders that take turns in one thread, and images that are decoded in others."""

    def __init__(self, session: ClipSession, fp32: ClipSession | None, limits: Limits, meters: Meters) -> None:
        """Load both encoders and the tokenizer of each.

        Args:
            session: of the bundle that is served.
            fp32: of its original.

        Raises:
            BundleError: `fp32` is no original of it, or a part cannot be loaded.
        """
        if fp32 is not None:
            _check_original(session, fp32)
        self._limits = limits
        self._encoding = ThreadPoolExecutor(1, "encoder")  # each encoder uses all cores by itself
        self._decoding = ThreadPoolExecutor(min(4, os.cpu_count() or 1), "pixels")
        sessions = [session] if fp32 is None else [session, fp32]
        for one in sessions:  # load all, and run it once: the first run takes longer than any other
            one.embed_images(np.zeros((8, 8, 3), np.uint8))
            one.embed_texts("a")
        self._behind = [_Behind(one, self._encoding, limits, meters) for one in sessions]

    @property
    def names(self) -> list[str]:
        """Widths, the served bundle's first."""
        return [behind.name for behind in self._behind]

    @asynccontextmanager
    async def running(self) -> AsyncIterator[None]:
        """Batchers run; threads end with them."""
        batchers = [batcher for behind in self._behind for batcher in (behind.image, behind.text)]
        tasks = [asyncio.create_task(batcher.run()) for batcher in batchers]
        try:
            yield
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)
            for threads in (self._encoding, self._decoding):
                threads.shutdown(wait=False, cancel_futures=True)

    async def image_embeds(self, images: Sequence[bytes]) -> Encoded:
        """Unit vectors of encoded images.

        Raises:
            Refused: one is none.
        """
        return await self._behind[0].image(await self._pixels(images))

    async def text_embeds(self, texts: Sequence[str]) -> Encoded:
        """Unit vectors of texts."""
        return await self._behind[0].text(texts)

    async def zero_shot(self, question: Question) -> list[Scores]:
        """What each bundle makes of it.

        Raises:
            Refused: an image is none.
        """
        pixels = await self._pixels(question.images)
        return [await behind.scores(pixels, question) for behind in self._behind]

    async def _pixels(self, images: Sequence[bytes]) -> list[np.ndarray]:
        loop, session = asyncio.get_running_loop(), self._behind[0].session
        found = []
        for number, image in enumerate(images):
            try:
                found.append(await loop.run_in_executor(self._decoding, session.pixels, image))
            except DatasetError as error:
                raise Refused(400, f"image {number}: {error}") from error
        return found


def _check_original(session: ClipSession, fp32: ClipSession) -> None:
    """Raises BundleError: the two do not compare."""
    served, original = session.bundle, fp32.bundle
    if original.quantized or not served.quantized:
        raise BundleError(
            f"--fp32 {original.path}: compares a quantised bundle with the FP32 one that it was made from."
        )
    if original.weights_sha256 != served.weights_sha256:
        raise BundleError(
            f"--fp32 {original.path}: is of other weights than {served.path}. Name the one it was made from."
        )
    if original.manifest.preprocess != served.manifest.preprocess:
        raise BundleError(
            f"--fp32 {original.path}: takes other pixels than {served.path}. Name the one it was made from."
        )
