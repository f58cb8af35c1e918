"""The search for the smallest files that keep a promise: the pairs of encoders that were tried, and how they did."""

import shutil
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, Bundle, encoder_size_bytes
from d4c_onnx.errors import CheckFailed
from d4c_onnx.graph.stored import average_bits
from d4c_onnx.manifest import Quantization
from d4c_onnx.quantization.ladder import EncoderLadder, WrittenRung
from d4c_onnx.quantization.promise import Pair, search
from d4c_onnx.quantization.quantized_completion import session_of
from d4c_onnx.recipe import QuantizationConfig
from d4c_onnx.results import Promise, PromiseTry, Versus

Judge = Callable[[Bundle], Versus]


@dataclass(frozen=True, slots=True)
class Judges:
    """How two written encoders are compared with FP32.

    Attributes:
        held_out: on the calibration set's held-out images and prompts.
        labelled: on the labelled set; it is asked only where a promise is about top-1.
    """

    held_out: Judge
    labelled: Judge


@dataclass
class PromiseSearch:
    """One search: what was tried, and what it measured."""

    bundle: Bundle
    folder: Path
    ladders: Mapping[str, EncoderLadder]
    config: QuantizationConfig
    judges: Judges
    tries: list[PromiseTry] = field(default_factory=list)
    _asked: dict[Pair, int] = field(default_factory=dict)

    def run(self) -> tuple[Promise, dict[str, WrittenRung]]:
        config = self.config
        image, text = (self.ladders[name] for name in (IMAGE_ENCODER, TEXT_ENCODER))
        found = search(
            (len(image.rungs), len(text.rungs)), self._cosines, config.target_cosine, self._lost, config.max_drop
        )
        if found is None:
            promise = Promise(config.target_cosine, config.max_drop, tuple(self.tries), None)
            raise CheckFailed(_not_kept(promise), promise)
        chosen = {IMAGE_ENCODER: image.write(found[0]), TEXT_ENCODER: text.write(found[1])}
        known = self._asked.get(found)
        if config.target_cosine is not None and (known is None or self.tries[known].cosine_image is None):
            self._cosines(found)  # each tower was settled beside another rung of the other
        last = self.tries[self._asked[found]]
        return Promise(config.target_cosine, config.max_drop, tuple(self.tries), last), chosen

    def _cosines(self, pair: Pair) -> tuple[float, float]:
        versus = self.judges.held_out(self._trial(pair))
        self._note(pair, cosine_image=versus.cosine_image, cosine_text=versus.cosine_text)
        return versus.cosine_image, versus.cosine_text

    def _lost(self, pair: Pair) -> float:
        lost = self.judges.labelled(self._trial(pair)).top1_lost
        self._note(pair, top1_lost=lost)
        return lost

    def _trial(self, pair: Pair) -> Bundle:
        """Both files of a pair, where a bundle's encoders are looked for; no bundle that anybody should serve."""
        folder = self.folder / "trial"
        shutil.rmtree(folder, ignore_errors=True)
        folder.mkdir(parents=True)
        for ladder, number in zip(self.ladders.values(), pair, strict=True):
            for file in ladder.write(number).path.parent.iterdir():
                (folder / file.name).hardlink_to(file)
        if self.bundle.tokenizer.exists():
            shutil.copyfile(self.bundle.tokenizer, folder / TOKENIZER)
        config = self.config
        served = Quantization(config.bits, config.target, "", {}, "", False, {}, session_of(config))
        return Bundle(folder, replace(self.bundle.manifest, quantization=served))

    def _note(self, pair: Pair, **measured: Any) -> None:
        """A try's line; what is measured of a pair that is known is added to its line."""
        if pair in self._asked:
            number = self._asked[pair]
            self.tries[number] = replace(self.tries[number], **measured)
            return
        image, text = (ladder.write(number) for ladder, number in zip(self.ladders.values(), pair, strict=True))
        average = round(average_bits([*image.report.layers, *text.report.layers]), 4)
        size = encoder_size_bytes(Bundle(self.folder / "trial", self.bundle.manifest))["total"]
        self._asked[pair] = len(self.tries)
        self.tries.append(replace(PromiseTry(image.rung.name, text.rung.name, average, size), **measured))


def _not_kept(promise: Promise) -> str:
    asked = []
    if promise.target_cosine is not None:
        best = [max(_known(promise, name), default=float("nan")) for name in ("cosine_image", "cosine_text")]
        asked.append(
            f"quantization.target_cosine {promise.target_cosine}: the nearest files reach {best[0]:.4f} (image) and "
            f"{best[1]:.4f} (text) on held-out data"
        )
    drops = _known(promise, "top1_lost")
    if promise.max_drop is not None and drops:
        asked.append(f"quantization.max_drop {promise.max_drop}: the nearest files lose {min(drops):.2f} points")
    return (
        f"NO CONFIGURATION KEEPS THE PROMISE. {'; '.join(asked)}. Nothing was written. Ask for less, or calibrate on "
        "more images (synthesis.images)."
    )


def _known(promise: Promise, name: str) -> list[float]:
    values = (getattr(entry, name) for entry in promise.tries)
    return [value for value in values if value is not None]
