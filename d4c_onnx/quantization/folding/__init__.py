"""Exact float rewrites before the rounding: batch norms, idle pools, patches, scales, gates, the start token."""

from d4c_onnx.quantization.folding.batch_norm import fold_batch_norms
from d4c_onnx.quantization.folding.gates import fold_gates
from d4c_onnx.quantization.folding.idle_pools import skip_idle_pools
from d4c_onnx.quantization.folding.patches import unfold_patches
from d4c_onnx.quantization.folding.smoothing import smooth
from d4c_onnx.quantization.folding.start_token import dead_start_rows, pin_start_token

__all__ = [
    "dead_start_rows",
    "fold_batch_norms",
    "fold_gates",
    "pin_start_token",
    "skip_idle_pools",
    "smooth",
    "unfold_patches",
]
