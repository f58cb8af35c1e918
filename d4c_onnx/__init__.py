"""d4c-onnx: data-free quantisation of CLIP models into small, fast ONNX encoders.

Importing this package loads neither torch nor onnxruntime; the names below are resolved on first use.
"""

import importlib
from typing import Any

__version__ = "0.1.0"

_PUBLIC = {
    "Bundle": "d4c_onnx.bundle",
    "CalibrationSet": "d4c_onnx.calibration",
    "ClipSession": "d4c_onnx.runtime",
    "D4CCalibrationDataReader": "d4c_onnx.calibration",
    "D4CError": "d4c_onnx.errors",
    "PromptCalibrationDataReader": "d4c_onnx.calibration",
    "Recipe": "d4c_onnx.recipe",
    "evaluate_bundles": "d4c_onnx.measure",
    "export_bundle": "d4c_onnx.pipeline",
    "load_recipe": "d4c_onnx.recipe_file",
    "package_bundle": "d4c_onnx.packaging",
    "quantize_bundle": "d4c_onnx.pipeline",
    "synthesize_calibration_set": "d4c_onnx.pipeline",
}

__all__ = ["__version__", *sorted(_PUBLIC)]


def __getattr__(name: str) -> Any:
    if name in _PUBLIC:
        return getattr(importlib.import_module(_PUBLIC[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")
