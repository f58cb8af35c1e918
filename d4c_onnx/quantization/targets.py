"""A target: what an execution provider wants of a quantised graph, as ordered rewrites and forms of storage."""

from __future__ import annotations

from dataclasses import dataclass, replace

import onnx_ir as ir

from d4c_onnx.errors import RecipeError
from d4c_onnx.graph.forms import CAST, FORMS, NATIVE, NIBBLES, Form
from d4c_onnx.graph.opsets import lower_opset
from d4c_onnx.quantization.rewrites import (
    Rewrite,
    batch_norm,
    fused_attention,
    gelu,
    identity_pools,
    patches,
    pooled_row,
    pools,
    quick_gelu,
    zero_points,
)
from d4c_onnx.quantization.storage import TokenTable
from d4c_onnx.recipe import QuantizationSection

# Before the plan, on the float graph; exact.
_FLOAT = (batch_norm.FOLD_BATCH_NORMS, identity_pools.DROP_IDENTITY_POOLS, quick_gelu.FOLD_QUICK_GELU)


@dataclass(frozen=True, slots=True)
class Target:
    """The form of a file for one way of serving it.

    Attributes:
        float_rewrites: of the float graph, in order, before anything is measured or rounded.
        served_rewrites: of the QDQ graph, in order; the answers stay the same.
        int4: how 4-bit weights without groups lie in the file.
        token_table: how the text encoder's does.
        note: what to expect there.
        symmetric: int8 activations with zero point 0 everywhere, instead of uint8 with any.
        quantize_bias: store a convolution's bias as int32; otherwise it stays float.
        reduce_range: neighbouring 8-bit weights add up to at most 128 (`rounding.pairs`). onnxruntime's kernels for x86
            without VNNI add two products of uint8 and int8 in 16 bits, which free weights overflow: ViT-B/32's W8A8
            image embeddings then were seven times further from FP32 than the file says.
        fp16_beside: put an FP16 bundle beside.
        lowest_opset: label files with the lowest opset and IR that express them, for runtimes that refuse newer ones.
    """

    float_rewrites: tuple[Rewrite, ...]
    served_rewrites: tuple[Rewrite, ...]
    int4: Form
    token_table: TokenTable
    note: str
    symmetric: bool = False
    quantize_bias: bool = True
    reduce_range: bool = True
    fp16_beside: bool = False
    lowest_opset: bool = False

    @property
    def grouped(self) -> bool:
        """Whether 4-bit weights may be paths through a trellis: compilers know nothing of those."""
        return self.int4 is not NATIVE

    def label(self, model: ir.Model) -> None:
        """Label a finished graph with the opset that its files are to have, in place."""
        if self.lowest_opset:
            lower_opset(model)


TARGETS = {
    "cpu": Target(
        float_rewrites=(*_FLOAT, patches.UNFOLD_PATCHES),
        served_rewrites=(
            pooled_row.COMPUTE_POOLED_ROW,
            gelu.SEPARATE_GELU,
            fused_attention.FUSE_ATTENTION,
            zero_points.OMIT_ZERO_POINTS,
            pools.CONVOLVE_POOLS,
        ),
        int4=CAST,
        token_table=TokenTable.PACKED,
        note="int8 kernels on onnxruntime's CPU provider",
    ),
    "portable": Target(
        float_rewrites=(*_FLOAT, patches.UNFOLD_PATCHES),
        served_rewrites=(
            pooled_row.COMPUTE_POOLED_ROW,
            gelu.SEPARATE_GELU,
            zero_points.OMIT_ZERO_POINTS,
            pools.CONVOLVE_POOLS,
        ),
        int4=NIBBLES,
        token_table=TokenTable.PACKED,
        note="standard operators only, in the lowest opset: for old runtimes and browsers, too",
        lowest_opset=True,
    ),
    "tensorrt": Target(
        float_rewrites=_FLOAT,
        served_rewrites=(pooled_row.COMPUTE_POOLED_ROW,),
        int4=NATIVE,
        token_table=TokenTable.FLOAT,
        note="for TensorRT's own compiler",
        symmetric=True,
        quantize_bias=False,
        reduce_range=False,
    ),
    "openvino": Target(
        float_rewrites=_FLOAT,
        served_rewrites=(pooled_row.COMPUTE_POOLED_ROW,),
        int4=NATIVE,
        token_table=TokenTable.PACKED,
        note="for OpenVINO's own compiler",
    ),
    "cuda": Target(
        float_rewrites=_FLOAT,
        served_rewrites=(pooled_row.COMPUTE_POOLED_ROW, fused_attention.FUSE_ATTENTION, zero_points.OMIT_ZERO_POINTS),
        int4=CAST,
        token_table=TokenTable.FOLDED,
        note="the CUDA provider has no kernel for QDQ products: it dequantises and multiplies in float, slower than "
        "FP32. Serve w4a16 there, or the FP16 bundle",
        reduce_range=False,
        fp16_beside=True,
    ),
}

_UNPACKED = "weights are unpacked to float16 when the file is loaded, and run as the FP16 bundle does"


def target_of(section: QuantizationSection) -> Target:
    """The recipe's target, with the keys that overrule it.

    Raises:
        RecipeError: a key asks for what the target rules out.
    """
    target = TARGETS[section.target]
    if section.int4_layout != "auto":
        if target.int4 not in (CAST, NIBBLES) or (section.target == "cuda" and section.int4_layout != "cast"):
            raise RecipeError(
                f"quantization.int4_layout: {section.int4_layout} is for onnxruntime's CPU provider; target "
                f"{section.target} stores 4-bit weights as {target.int4.name}. Leave it out."
            )
        target = replace(target, int4=FORMS[section.int4_layout])
    if section.reduce_range is not None:
        target = replace(target, reduce_range=section.reduce_range)
    return replace(target, note=_note(section, target))


def _note(section: QuantizationSection, target: Target) -> str:
    """What to expect of the form that was chosen."""
    if section.weights_only:
        return _UNPACKED
    note = target.note
    if section.group_size and section.weight_bits == 4 and not target.grouped:
        note += "; 4-bit weights have one scale a channel there, and no groups"
    compiled = target.int4 is NATIVE and section.weight_bits == 4
    if compiled:
        note += "; onnxruntime's CPU provider runs 4-bit layers of this file in float"
    if target.symmetric and not compiled:
        note += "; on x86 onnxruntime computes in float whatever reads an int8 activation that several nodes read"
    return note
