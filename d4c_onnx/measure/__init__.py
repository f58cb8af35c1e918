"""What can be asked of finished bundles: accuracy, speed, content, and what a calibration set is like. Never torch."""

from d4c_onnx.measure.accuracy import evaluate_bundles
from d4c_onnx.measure.calibration_report import report_calibration_set
from d4c_onnx.measure.content import inspect_bundle
from d4c_onnx.measure.machine import Machine
from d4c_onnx.measure.speed import benchmark_bundles

__all__ = ["Machine", "benchmark_bundles", "evaluate_bundles", "inspect_bundle", "report_calibration_set"]
