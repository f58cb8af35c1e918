"""Rewrites of a graph, one file each, as values; a target names an ordered tuple of them (`choices.TARGETS`).

Given out here is what a rewrite is and what the story calls by itself; whoever chooses a rewrite imports its own file.
"""

from d4c_onnx.quantization.rewrites.answers_check import same_answers
from d4c_onnx.quantization.rewrites.float16 import in_float16
from d4c_onnx.quantization.rewrites.outlier_channels import split_outliers
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite, Verify, apply_all
from d4c_onnx.quantization.rewrites.smoothing import smooth
from d4c_onnx.quantization.rewrites.start_token import dead_start_rows, pin_start_token
from d4c_onnx.quantization.rewrites.two_terms import add_second_terms, read_by_pooled_row

__all__ = [
    "Result",
    "Rewrite",
    "Verify",
    "add_second_terms",
    "apply_all",
    "dead_start_rows",
    "in_float16",
    "pin_start_token",
    "read_by_pooled_row",
    "same_answers",
    "smooth",
    "split_outliers",
]
