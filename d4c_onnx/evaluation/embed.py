"""Images and texts to unit vectors with the written files, as onnxruntime executes them."""

from collections.abc import Callable, Iterable

import numpy as np
from PIL import Image

from d4c_onnx.bundle import Bundle
from d4c_onnx.runtime.preprocess import preprocess_image
from d4c_onnx.runtime.session import EncoderSession
from d4c_onnx.runtime.tokenizer import TextTokenizer
from d4c_onnx.runtime.vectors import unit


class BundleEncoders:
    """Both encoders of a bundle, loaded, with their preprocess and tokenizer."""

    def __init__(self, bundle: Bundle, provider: str = "cpu", threads: int = 0) -> None:
        self.bundle = bundle
        self._image = EncoderSession(bundle.image_encoder, provider, threads, entries=bundle.session_entries)
        self._text = EncoderSession(bundle.text_encoder, provider, threads, entries=bundle.session_entries)

    def image_batches(
        self, batches: Iterable[Iterable[Image.Image]], on_batch: Callable[[int], None] | None = None
    ) -> np.ndarray:
        """float32 [N, D] unit vectors."""
        config = self.bundle.manifest.preprocess
        return self.pixel_batches(
            (np.stack([preprocess_image(image, config) for image in batch]) for batch in batches), on_batch
        )

    def pixel_batches(self, batches: Iterable[np.ndarray], on_batch: Callable[[int], None] | None = None) -> np.ndarray:
        """float32 [N, D] unit vectors of pixel_values batches [B, 3, H, W]."""
        parts: list[np.ndarray] = []
        for batch in batches:
            parts.append(unit(self._image.run(np.ascontiguousarray(batch))))
            if on_batch is not None:
                on_batch(len(batch))
        return np.concatenate(parts)

    def texts(self, texts: list[str], batch: int = 64) -> np.ndarray:
        """float32 [N, D] unit vectors."""
        tokenizer = TextTokenizer(self.bundle.tokenizer, self.bundle.manifest.tokenizer)
        parts = [self._text.run(self._fit(tokenizer(texts[i : i + batch]))) for i in range(0, len(texts), batch)]
        return unit(np.concatenate(parts))

    def _fit(self, input_ids: np.ndarray) -> np.ndarray:
        length = self._text.fixed_length
        if length is None or input_ids.shape[1] == length:
            return input_ids
        pad = self.bundle.manifest.tokenizer.pad_id or 0
        return np.pad(input_ids, ((0, 0), (0, length - input_ids.shape[1])), constant_values=pad)


def class_embeddings(encoders: BundleEncoders, classes: tuple[str, ...], templates: tuple[str, ...]) -> np.ndarray:
    """Prompt ensembling: per class, the normalised mean of its templates' unit vectors; float32 [K, D]."""
    vectors = encoders.texts([template.format(name) for name in classes for template in templates])
    return unit(vectors.reshape(len(classes), len(templates), -1).mean(1))
