"""What a quantisation reports: sizes, accuracy and time, beside FP32."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Generic, TypeVar

from d4c_onnx.bundle import Bundle, encoder_size_bytes
from d4c_onnx.results import Accuracy, Promise

if TYPE_CHECKING:
    from d4c_onnx.calibration.dataset import CalibrationSet

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class BeforeAfter(Generic[T]):
    """The same of the FP32 bundle and of the quantised one."""

    fp32: T
    quantized: T


@dataclass(frozen=True, slots=True)
class CalibratedWith:
    """What a quantisation looked at.

    Attributes:
        images, texts: how many.
        method: how the images came into being (`synthesis.method`).
        own_texts: whether the texts are the user's, and not nouns and random words in templates.
    """

    images: int
    method: str
    texts: int
    own_texts: bool


@dataclass(frozen=True, slots=True)
class QuantizeReport:
    """A quantised bundle and what was measured of it.

    Attributes:
        model, pretrained, bits, target, target_note, accuracy_mode_only, weight_bits_average: as in its manifest.
        bundle: its folder.
        calibration: the calibration set's id.
        calibrated_with: what is in it.
        size_bytes, size_ratio: image, text and total.
        top1: in percent; None without labels.
        accuracy: the FP32 bundle's row first, then the quantised one's, then an FP16 bundle's.
        seconds: by step.
        promise: what the widths were searched for, and everything that was tried; None where they were given.
    """

    model: str
    pretrained: str
    bits: str
    bundle: Path
    calibration: str | None
    calibrated_with: CalibratedWith
    accuracy_mode_only: bool
    target: str
    target_note: str
    weight_bits_average: float | None
    size_bytes: BeforeAfter[Mapping[str, int]]
    size_ratio: Mapping[str, float]
    top1: BeforeAfter[float | None]
    accuracy: Accuracy
    seconds: Mapping[str, float]
    promise: Promise | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        promise = {} if self.promise is None else {"promise": self.promise.as_dict()}
        content = asdict(replace(self, promise=None)) | {
            "accuracy": self.accuracy.as_dict(),
            "bundle": str(self.bundle),
        }
        del content["promise"]
        return content | promise


def report_of(
    fp32: Bundle, quantized: Bundle, dataset: CalibrationSet, accuracy: Accuracy, seconds: Mapping[str, float]
) -> QuantizeReport:
    """The report of a measured bundle."""
    made = quantized.manifest.quantization
    assert made is not None
    before, after = encoder_size_bytes(fp32), encoder_size_bytes(quantized)
    return QuantizeReport(
        model=fp32.model_name,
        pretrained=fp32.manifest.model.pretrained,
        bits=made.bits,
        bundle=quantized.path,
        calibration=made.calibration,
        calibrated_with=calibrated_with(dataset),
        accuracy_mode_only=made.accuracy_mode_only,
        target=made.target,
        target_note=made.target_note,
        weight_bits_average=made.weight_bits_average,
        size_bytes=BeforeAfter(before, after),
        size_ratio={part: round(before[part] / after[part], 3) for part in before},
        top1=BeforeAfter(*(row.top1 for row in accuracy.bundles[:2])),
        accuracy=accuracy,
        seconds={name: round(value, 2) for name, value in seconds.items()},
        promise=made.promise,
    )


def calibrated_with(dataset: CalibrationSet) -> CalibratedWith:
    """What is in a set, by its own word."""
    key = dataset.manifest.key
    images, texts = len(dataset.pixel_values), len(dataset.texts)
    return CalibratedWith(images, key.method_name, texts, key.texts_sha256 is not None)
