"""The whole story: export -> synthesis -> quantisation -> evaluation. Every command is one call of this package.

torch is imported inside the steps that need it: quantising a bundle with a calibration set at hand needs none.
"""

from d4c_onnx.pipeline.exporting import bundle_folder, export_bundle
from d4c_onnx.pipeline.importing import import_bundle
from d4c_onnx.pipeline.quantize_report import BeforeAfter, QuantizeReport
from d4c_onnx.pipeline.quantizing import quantize_bundle
from d4c_onnx.pipeline.synthesizing import synthesize_calibration_set

__all__ = [
    "BeforeAfter",
    "QuantizeReport",
    "bundle_folder",
    "export_bundle",
    "import_bundle",
    "quantize_bundle",
    "synthesize_calibration_set",
]
