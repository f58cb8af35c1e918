"""Rewrites of a graph, one file each, as values; a target is an ordered tuple of them (`quantization.targets`)."""

from d4c_onnx.quantization.rewrites.batch_norm import FOLD_BATCH_NORMS
from d4c_onnx.quantization.rewrites.float16 import convert_to_float16
from d4c_onnx.quantization.rewrites.fused_attention import FUSE_ATTENTION
from d4c_onnx.quantization.rewrites.gelu import SEPARATE_GELU
from d4c_onnx.quantization.rewrites.identity_pools import DROP_IDENTITY_POOLS
from d4c_onnx.quantization.rewrites.patches import UNFOLD_PATCHES
from d4c_onnx.quantization.rewrites.pooled_row import COMPUTE_POOLED_ROW
from d4c_onnx.quantization.rewrites.pools import CONVOLVE_POOLS
from d4c_onnx.quantization.rewrites.quick_gelu import FOLD_QUICK_GELU
from d4c_onnx.quantization.rewrites.residuals import FUSE_RESIDUALS
from d4c_onnx.quantization.rewrites.rewrite import Result, Rewrite, Verify, apply_all
from d4c_onnx.quantization.rewrites.smoothing import smooth
from d4c_onnx.quantization.rewrites.start_token import dead_start_rows, pin_start_token
from d4c_onnx.quantization.rewrites.verify import same_answers
from d4c_onnx.quantization.rewrites.zero_points import OMIT_ZERO_POINTS

# Around the conversion to float16: before it, and after it.
FLOAT16_BEFORE = (FOLD_BATCH_NORMS, DROP_IDENTITY_POOLS, COMPUTE_POOLED_ROW)
FLOAT16_AFTER = (FUSE_ATTENTION, FUSE_RESIDUALS)

__all__ = [
    "COMPUTE_POOLED_ROW",
    "CONVOLVE_POOLS",
    "DROP_IDENTITY_POOLS",
    "FLOAT16_AFTER",
    "FLOAT16_BEFORE",
    "FOLD_BATCH_NORMS",
    "FOLD_QUICK_GELU",
    "FUSE_ATTENTION",
    "FUSE_RESIDUALS",
    "OMIT_ZERO_POINTS",
    "SEPARATE_GELU",
    "UNFOLD_PATCHES",
    "Result",
    "Rewrite",
    "Verify",
    "apply_all",
    "convert_to_float16",
    "dead_start_rows",
    "pin_start_token",
    "same_answers",
    "smooth",
]
