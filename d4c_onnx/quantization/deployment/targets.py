"""What an execution provider wants of a quantised graph."""

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Literal

from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe import QuantizationSection


@dataclass(frozen=True, slots=True)
class Target:
    """The form of a file for one way of serving it.

    Attributes:
        int4_layout: how 4-bit weights lie in the file (see `quantization.layout`).
        fused_attention: `com.microsoft.MultiHeadAttention` instead of standard operators.
        standard_attention: the standard Attention of opset 23 instead of the operators it is made of.
        fused_residuals: in float16, `com.microsoft.SkipLayerNormalization` instead of sums and LayerNormalization.
        fused_biases: `com.microsoft.MatMulIntegerToFloat` instead of QDQ products with a bias behind them.
        fused_qkv: products that read the same value are one.
        separate_gelu: GELU stays apart from the bias before it, for the CPU provider.
        patch_product: a ViT's patch convolution is quantised as a product of patches.
        convolved_pools: average pools between integers are depthwise convolutions.
        symmetric: int8 activations with zero point 0 everywhere, instead of uint8 with any.
        quantize_bias: store a convolution's bias as int32; otherwise it stays float.
        reduce_range: 8-bit weights stay in [-64, 63]. onnxruntime's kernels for x86 without VNNI add two products of
            uint8 and int8 in 16 bits, which full weights overflow: ViT-B/32's W8A8 image embeddings then were seven
            times further from FP32 than the file says.
        weight_zero_points: products' weights have zero points, all 0, as compilers want them; ONNX takes absent ones as
            0, and given one a channel, onnxruntime's product corrects each channel for it.
        token_table: packed: integers that stay packed in memory, and only looked-up rows are unpacked; folded: integers
            that are unpacked when the file is loaded, for the CUDA provider has no bit operations; float: as it is,
            for TensorRT's parser takes neither.
        half: put an FP16 bundle beside.
        note: what to expect there.
    """

    int4_layout: Literal["cast", "native", "nibbles"]
    fused_attention: bool
    fused_residuals: bool
    separate_gelu: bool
    patch_product: bool
    convolved_pools: bool
    symmetric: bool
    quantize_bias: bool
    reduce_range: bool
    weight_zero_points: bool
    token_table: Literal["packed", "folded", "float"]
    half: bool
    note: str
    standard_attention: bool = False
    fused_biases: bool = False
    fused_qkv: bool = False


TARGETS = {
    "cpu": Target(
        int4_layout="cast",
        fused_attention=True,
        fused_residuals=False,
        separate_gelu=True,
        patch_product=True,
        convolved_pools=True,
        symmetric=False,
        quantize_bias=True,
        reduce_range=True,
        weight_zero_points=False,
        token_table="packed",
        half=False,
        note="int8 kernels on onnxruntime's CPU provider",
    ),
    "portable": Target(
        int4_layout="cast",
        fused_attention=False,
        fused_residuals=False,
        separate_gelu=True,
        patch_product=True,
        convolved_pools=True,
        symmetric=False,
        quantize_bias=True,
        reduce_range=True,
        weight_zero_points=False,
        token_table="packed",
        half=False,
        note="standard operators only; int8 kernels on the CPU provider",
    ),
    "tensorrt": Target(
        int4_layout="native",
        fused_attention=False,
        fused_residuals=False,
        separate_gelu=False,
        patch_product=False,
        convolved_pools=False,
        symmetric=True,
        quantize_bias=False,
        reduce_range=False,
        weight_zero_points=True,
        token_table="float",
        half=False,
        note="for TensorRT's own compiler",
    ),
    "openvino": Target(
        int4_layout="native",
        fused_attention=False,
        fused_residuals=False,
        separate_gelu=False,
        patch_product=False,
        convolved_pools=False,
        symmetric=False,
        quantize_bias=True,
        reduce_range=True,
        weight_zero_points=True,
        token_table="packed",
        half=False,
        note="for OpenVINO's own compiler",
    ),
    "cuda": Target(
        int4_layout="cast",
        fused_attention=True,
        fused_residuals=True,
        separate_gelu=False,
        patch_product=False,
        convolved_pools=False,
        symmetric=False,
        quantize_bias=True,
        reduce_range=False,
        weight_zero_points=False,
        token_table="folded",
        half=True,
        note="the CUDA provider has no kernel for QDQ products: it dequantises and multiplies in float, slower than "
        "FP32. Serve w4a16 there, or the FP16 bundle",
    ),
}


_UNPACKED = "weights are unpacked to float16 when the file is loaded, and run as the FP16 bundle does"
# Recipe keys that overrule a target's fields of the same name.
_OVERRULING = [field.name for field in fields(Target) if field.name not in ("int4_layout", "half", "note")]
# Keys whose rewrites are of integer products, or of files that onnxruntime itself runs.
_OF_INTEGERS = (
    "fused_biases",
    "fused_qkv",
    "separate_gelu",
    "convolved_pools",
    "symmetric",
    "quantize_bias",
    "weight_zero_points",
)
_OF_KERNELS = ("fused_biases", "fused_qkv", "convolved_pools", "standard_attention")


def target_of(section: QuantizationSection) -> Target:
    """The recipe's target, with the keys that overrule it.

    Raises:
        RecipeError: a key asks for what another one, or the target, rules out.
    """
    target = TARGETS[section.target]
    if section.int4_layout != "auto":
        table = "packed" if target.token_table == "folded" and section.int4_layout != "cast" else target.token_table
        target = replace(
            target,
            int4_layout=section.int4_layout,
            token_table=table,
            weight_zero_points=section.int4_layout == "native",
        )
        if section.int4_layout == "native" and section.target in ("cpu", "portable"):  # then it is for a compiler
            target = replace(target, fused_attention=False, separate_gelu=False, convolved_pools=False)
    default = target
    if section.standard_attention:
        target = replace(target, fused_attention=False)
    overruled = {key: value for key in _OVERRULING if (value := getattr(section, key)) is not None}
    target = replace(target, **overruled)
    _refuse_contradictions(section, default, target)
    return replace(target, note=_note(section, target))


def _refuse_contradictions(section: QuantizationSection, default: Target, form: Target) -> None:
    """Keys that would be silently without effect, or make a file that its target cannot load.

    Here are those that depend on the target; a recipe that contradicts itself is refused where it is read.
    """

    def refuse(keys: Sequence[str], reason: str) -> None:
        for key in keys:
            chosen = getattr(section, key)
            if chosen and chosen != getattr(default, key, None):
                raise RecipeError(f"quantization.{key}: {reason}. Leave it out.")

    if section.weights_only:
        refuse(_OF_INTEGERS, f"at {section.bits} no product is one of integers")
    if form.int4_layout == "native":
        refuse(_OF_KERNELS, "int4 layout native is plain QDQ for compilers, which fuse by themselves")
    if section.weight_zero_points:
        refuse(("fused_biases", "fused_qkv"), "such a product has no place for weight_zero_points")
    if form.symmetric:
        refuse(("fused_biases",), "onnxruntime's CPU provider has no such kernel for int8 activations")
    if section.attention == "int8":
        refuse(("fused_attention", "standard_attention"), "it is float, and quantization.attention is int8")
    if section.fused_attention:
        refuse(("standard_attention",), "quantization.fused_attention is another operator for the same")
    if section.target == "cuda":
        refuse(("standard_attention",), "the FP16 bundle beside needs onnxruntime's own operator")
    else:
        refuse(("fused_residuals",), f"it is for float16 files, and target {section.target} writes none")
    if form.token_table == "float":
        refuse(("embedding_bits",), "the token table stays float")
    if section.target == "tensorrt":
        refuse(("fused_attention", "fused_biases"), "TensorRT knows no operators of onnxruntime's own")
        if section.symmetric is False or section.token_table in ("packed", "folded"):
            raise RecipeError(
                "quantization.symmetric, quantization.token_table: TensorRT takes activations with zero point 0 and "
                "float tables only. Leave them out."
            )


def _note(section: QuantizationSection, form: Target) -> str:
    """What to expect of the form that was chosen."""
    if section.weights_only:
        return _UNPACKED
    note = form.note
    compiled = form.int4_layout == "native" and section.weight_bits == 4
    if section.target == "portable" and (form.fused_attention or form.fused_biases):
        note = TARGETS["cpu"].note
    if section.target in ("cpu", "portable") and compiled:
        note = "plain int4, for compilers"
    if compiled:
        note += "; onnxruntime's CPU provider runs 4-bit layers of this file in float"
    if form.symmetric and not compiled:
        note += "; on x86 onnxruntime computes in float whatever reads an int8 activation that several nodes read"
    return note
