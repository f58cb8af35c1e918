"""ONNX files that others exported -> the FP32 bundle: let in, understood, rewritten into our forms, compared."""

from d4c_onnx.foreign.again import check_made_of
from d4c_onnx.foreign.imported_bundle import import_files
from d4c_onnx.foreign.opening import ForeignFiles

__all__ = ["ForeignFiles", "check_made_of", "import_files"]
