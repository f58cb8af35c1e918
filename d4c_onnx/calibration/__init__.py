"""The calibration set on disk, the `CalibrationDataReader`s and the range observers. Never torch.

The readers import onnxruntime, so the names below are resolved on first use: synthesis writes sets without it.
"""

import importlib
from typing import Any

_PUBLIC = {
    "CalibrationSet": "d4c_onnx.calibration.dataset",
    "D4CCalibrationDataReader": "d4c_onnx.calibration.readers",
    "PromptCalibrationDataReader": "d4c_onnx.calibration.readers",
    "open_calibration_set": "d4c_onnx.calibration.dataset",
}

__all__ = sorted(_PUBLIC)


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
