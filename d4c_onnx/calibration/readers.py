"""`CalibrationDataReader`s over a calibration set: streaming, rewindable, usable with `quantize_static` alone.

from onnxruntime.quantization import quantize_static
quantize_static("image_encoder.onnx", "int8.onnx", D4CCalibrationDataReader("exported/mini-vit/calibration-..."))
"""

from collections.abc import Iterator, Sequence
from pathlib import Path

import numpy as np
from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.calibration.dataset import CalibrationSet, open_calibration_set
from d4c_onnx.calibration.image_views import views
from d4c_onnx.errors import CalibrationError

_MOST_VIEWS = 3


class _BatchReader(CalibrationDataReader):
    """Feeds one batch after the other; `rewind` starts over."""

    def __init__(self, input_name: str) -> None:
        self.input_name = input_name
        self._batches = self._stream()

    def _stream(self) -> Iterator[np.ndarray]:
        raise NotImplementedError

    def __len__(self) -> int:
        return sum(1 for _ in self._stream())

    def get_next(self) -> dict[str, np.ndarray] | None:
        """The next batch by input name, or None at the end (onnxruntime's contract)."""
        batch = next(self._batches, None)
        return None if batch is None else {self.input_name: batch}

    def rewind(self) -> None:
        """Start over with the first batch."""
        self._batches = self._stream()

    def set_range(self, start_index: int, end_index: int) -> None:
        """onnxruntime's hook for strided calibration: it would cut batches apart, and memory is bounded already."""
        raise CalibrationError("CalibStridedMinMax is not supported: these readers already stream in bounded memory.")


class OneBatchReader(_BatchReader):
    """A single batch, for tools whose calibration does not matter: speed races, or ranges that are overridden."""

    def __init__(self, batch: np.ndarray, input_name: str) -> None:
        self._batch = batch
        super().__init__(input_name)

    def _stream(self) -> Iterator[np.ndarray]:
        yield self._batch


class SpreadReader(_BatchReader):
    """A few batches of another reader, from its start to its end: prompts are sorted by length."""

    def __init__(self, reader: CalibrationDataReader, samples: int) -> None:
        """Take as many batches as hold that many samples, and at least one."""
        reader.rewind()
        feeds = []
        while (feed := reader.get_next()) is not None:
            feeds.append(feed)
        largest = max(len(batch) for feed in feeds for batch in feed.values())
        chosen = np.linspace(0, len(feeds) - 1, min(len(feeds), -(-samples // largest)), dtype=int)
        self._chosen = [next(iter(feeds[number].values())) for number in chosen]
        super().__init__(next(iter(feeds[0])))

    def _stream(self) -> Iterator[np.ndarray]:
        yield from self._chosen


class ViewsReader(_BatchReader):
    """Another reader's batches, and where those are few images, `views` of them, round after round."""

    def __init__(self, reader: CalibrationDataReader, at_least: int) -> None:
        """Read again what is read.

        Args:
            reader: rewindable, of images or of anything else.
            at_least: of images, views counted; but no more than three views of any, which would teach little.
        """
        self._reader, self._at_least = reader, at_least
        reader.rewind()
        super().__init__(next(iter(reader.get_next() or {}), ""))

    def _stream(self) -> Iterator[np.ndarray]:
        seen = 0
        for again in range(1 + _MOST_VIEWS):
            self._reader.rewind()
            for number, feed in enumerate(iter(self._reader.get_next, None)):
                batch = feed[self.input_name]
                seen += len(batch) if batch.ndim == 4 else self._at_least  # no other than images has views
                yield views(batch, seed=(again, number)) if again else batch
            if seen >= self._at_least:
                return


class D4CCalibrationDataReader(_BatchReader):
    """Images of a calibration set, read from disk batch by batch."""

    def __init__(self, source: str | Path | CalibrationSet, batch: int = 8, input_name: str = "pixel_values") -> None:
        """Args: source: a set or its folder; batch: images per feed; input_name: the encoder's input.

        Raises:
            CalibrationError: the folder is not a calibration set, or holds no image.
        """
        dataset = source if isinstance(source, CalibrationSet) else open_calibration_set(source)
        if not len(dataset.pixel_values):
            raise CalibrationError("the calibration set holds no image. Raise synthesis.images.")
        self._pixels, self._batch = dataset.pixel_values, batch
        super().__init__(input_name)

    def _stream(self) -> Iterator[np.ndarray]:
        for start in range(0, len(self._pixels), self._batch):
            yield np.array(self._pixels[start : start + self._batch], np.float32)


class PromptCalibrationDataReader(_BatchReader):
    """Prompts of a calibration set, grouped by length so that no batch holds padding.

    In a causal tower everything after the end token is irrelevant, and so is padding in one that hides it, yet it would
    be nine tenths of what the ranges see (a prompt has 8 tokens, a padded row 77).
    """

    def __init__(
        self,
        source: str | Path | CalibrationSet | Sequence[Sequence[int]],
        batch: int = 8,
        input_name: str = "input_ids",
        fixed_length: int | None = None,
        pad_id: int = 0,
    ) -> None:
        """Read prompts.

        Args:
            source: a set, its folder, or rows of token ids.
            batch: prompts per feed, at most.
            input_name: the encoder's input.
            fixed_length: pad every row to this length, for towers without a dynamic sequence;
            pad_id: with this.

        Raises:
            CalibrationError: the folder is not a calibration set, or there is no prompt.
        """
        if isinstance(source, (str, Path)):
            source = open_calibration_set(source)
        rows = source.input_ids if isinstance(source, CalibrationSet) else source
        if not len(rows):
            raise CalibrationError("the calibration set holds no prompt. Raise text.prompts.")
        if fixed_length is not None:
            rows = [[*row, *[pad_id] * (fixed_length - len(row))][:fixed_length] for row in rows]
        self._rows, self._batch = sorted(rows, key=len), batch  # sorted is stable: the order is reproducible
        super().__init__(input_name)

    def _stream(self) -> Iterator[np.ndarray]:
        start = 0
        while start < len(self._rows):
            length, stop = len(self._rows[start]), start + 1
            while stop < len(self._rows) and stop - start < self._batch and len(self._rows[stop]) == length:
                stop += 1
            yield np.array(self._rows[start:stop], np.int64)
            start = stop


def first_batches(reader: CalibrationDataReader, samples: int) -> list[np.ndarray]:
    """As many batches from a reader's start as hold that many samples, for what is measured on a few only."""
    reader.rewind()
    batches: list[np.ndarray] = []
    while sum(len(batch) for batch in batches) < samples and (feed := reader.get_next()) is not None:
        batches.append(next(iter(feed.values())))
    return batches
