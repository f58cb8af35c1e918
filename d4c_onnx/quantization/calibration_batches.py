"""Calibration data of both encoders, in batches that fit in memory."""

from pathlib import Path

from onnxruntime.quantization import CalibrationDataReader

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, Bundle, file_size_bytes
from d4c_onnx.calibration.dataset import CalibrationSet
from d4c_onnx.calibration.readers import D4CCalibrationDataReader, PromptCalibrationDataReader

_BATCH = 8
# All activations of a batch are looked at: of 8 images they take 1.4 GB in a ViT-L/14, several times that on their way.
_LARGE_BYTES, _LARGE_BATCH = 2**30, 2


def calibration_readers(bundle: Bundle, dataset: CalibrationSet) -> dict[str, CalibrationDataReader]:
    """Per encoder file its calibration data, in batches that fit in memory."""
    length, pad = bundle.manifest.io[TEXT_ENCODER].inputs[0].shape[1], bundle.manifest.tokenizer.pad_id or 0
    fixed = length if isinstance(length, int) and length else None
    return {
        IMAGE_ENCODER: D4CCalibrationDataReader(dataset, images_at_a_time(bundle.image_encoder)),
        TEXT_ENCODER: PromptCalibrationDataReader(dataset, _BATCH, fixed_length=fixed, pad_id=pad),
    }


def images_at_a_time(encoder: Path) -> int:
    """How many images a calibration batch of an encoder holds, so that their activations fit in memory."""
    return _LARGE_BATCH if file_size_bytes(encoder) > _LARGE_BYTES else _BATCH
