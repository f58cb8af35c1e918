"""What an execution provider wants of a quantised graph."""

from dataclasses import dataclass, replace
from typing import Literal

from d4c_onnx.recipe import QuantizationSection


@dataclass(frozen=True, slots=True)
class Target:
    """The form of a file for one way of serving it.

    Attributes:
        int4_layout: how 4-bit weights lie in the file (see `quantization.layout`).
        fused_attention: `com.microsoft.MultiHeadAttention` instead of standard operators.
        symmetric: int8 activations with zero point 0 everywhere, instead of uint8 with any.
        quantize_bias: store a convolution's bias as int32; otherwise it stays float.
        half: put an FP16 bundle beside the int8 one.
        note: what to expect there.
    """

    int4_layout: Literal["cast", "native", "nibbles"]
    fused_attention: bool
    symmetric: bool
    quantize_bias: bool
    half: bool
    note: str


TARGETS = {
    "cpu": Target("cast", True, False, True, False, "int8 kernels on onnxruntime's CPU provider"),
    "portable": Target("cast", False, False, True, False, "standard operators only; int8 kernels on the CPU provider"),
    "tensorrt": Target(
        "native",
        False,
        True,
        False,
        False,
        "for TensorRT's own compiler; onnxruntime's CPU provider runs 4-bit layers of this file in float",
    ),
    "openvino": Target(
        "native",
        False,
        False,
        True,
        False,
        "for OpenVINO's own compiler; onnxruntime's CPU provider runs 4-bit layers of this file in float",
    ),
    "cuda": Target(
        "cast",
        False,
        False,
        True,
        True,
        "the CUDA provider has no kernel for QDQ products: it dequantises and multiplies in float, so the int8 file "
        "saves download and disk, not time; serve the FP16 bundle there, or TensorRT",
    ),
}


def target_of(section: QuantizationSection) -> Target:
    """The recipe's target, with the keys that overrule it."""
    target = TARGETS[section.target]
    if section.int4_layout != "auto":
        target = replace(target, int4_layout=section.int4_layout)
    if section.fused_attention is not None:
        target = replace(target, fused_attention=section.fused_attention)
    return target
