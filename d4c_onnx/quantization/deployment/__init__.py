"""The last step of quantisation: the graph that is served, for a target. But for float16, the answers stay the same."""

from d4c_onnx.quantization.deployment.activations import separate_gelu
from d4c_onnx.quantization.deployment.attention import fuse_attention
from d4c_onnx.quantization.deployment.biases import fuse_biases
from d4c_onnx.quantization.deployment.float16 import convert_to_half
from d4c_onnx.quantization.deployment.pools import convolve_pools
from d4c_onnx.quantization.deployment.products import fuse_qkv
from d4c_onnx.quantization.deployment.residuals import fuse_residuals
from d4c_onnx.quantization.deployment.rows import compute_pooled_row_only
from d4c_onnx.quantization.deployment.targets import TARGETS, Target, target_of

__all__ = [
    "TARGETS",
    "Target",
    "compute_pooled_row_only",
    "convert_to_half",
    "convolve_pools",
    "fuse_attention",
    "fuse_biases",
    "fuse_qkv",
    "fuse_residuals",
    "separate_gelu",
    "target_of",
]
