"""The words that name a rounding, a target, a synthesis: for recipes, `--help` and the rooms that do the work.

Nothing is imported here: a recipe is checked, and help is shown, without numpy and onnx. So a row names the values that
do the work, `module.VALUE` where they are files of a room, and `quantization.rounding` and `quantization.targets` look
them up.
"""

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Literal

# How calibration images come into being; those that optimise images are values of `calibration.method`.
SynthesisMethod = Literal["d4c", "d4c-light", "d4c-published", "bns", "pse", "noise", "pink", "leaves", "real"]


@dataclass(frozen=True, slots=True)
class RoundingChoice:
    """A rounding's row.

    Attributes:
        module, value: where its `Rounding` is, in `quantization.rounding`.
        learns: by torch's gradients, from the outputs: nothing is left to correct, and a channel has one scale.
        clause: what `d4c-onnx recipe` says of it; empty where its name says enough.
    """

    module: str
    value: str
    learns: bool = False
    clause: str = ""


ROUNDINGS = {
    "nearest": RoundingChoice("layerwise", "NEAREST"),
    "gptq": RoundingChoice("gptq", "GPTQ"),
    "gptaq": RoundingChoice("gptq", "GPTAQ"),
    "yaqa": RoundingChoice("yaqa", "YAQA"),
    "adaround": RoundingChoice("reconstruction", "ADAROUND", learns=True),
    "adaround-published": RoundingChoice(
        "reconstruction", "ADAROUND_PUBLISHED", learns=True, clause="for the published 20,000 steps a region"
    ),
}


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetTraits:
    """What a target asks for beside rewrites and forms of storage.

    Attributes:
        note: what to expect there.
        symmetric: int8 activations with zero point 0 everywhere, instead of uint8 with any.
        quantize_bias: store a convolution's bias as int32; otherwise it stays float.
        reduce_range: neighbouring 8-bit weights add up to at most 128 (`rounding.pairs`). onnxruntime's kernels for x86
            without VNNI add two products of uint8 and int8 in 16 bits, which free weights overflow: ViT-B/32's W8A8
            image embeddings then were seven times further from FP32 than the file says.
        float16: its provider multiplies float16: widths that keep activations so are for it, and an FP16 bundle is put
            beside.
        lowest_opset: label files with the lowest opset and IR that express them, for runtimes that refuse newer ones.
        two_terms: what only products of the pooled row read is the sum of two integer terms: an integer kernel more for
            each of these products, and nothing averages their errors.
    """

    note: str
    symmetric: bool = False
    quantize_bias: bool = True
    reduce_range: bool = True
    float16: bool = False
    lowest_opset: bool = False
    two_terms: bool = False


@dataclass(frozen=True, slots=True, kw_only=True)
class TargetChoice(TargetTraits):
    """A target's row.

    Attributes:
        clause: where its files are served, as recipes and `--help` say it.
        float_rewrites, served_rewrites: before rounding and after it, in order; in `quantization.rewrites`.
        int4: the form of 4-bit weights without groups, by its name in `graph.forms`.
        token_table: the text encoder's, a word of `quantization.storage.TokenTable`.
    """

    clause: str
    float_rewrites: tuple[str, ...]
    served_rewrites: tuple[str, ...]
    int4: str
    token_table: str


_FLOAT = ("batch_norm.FOLD_BATCH_NORMS", "identity_pools.DROP_IDENTITY_POOLS", "quick_gelu.FOLD_QUICK_GELU")

TARGETS = {
    "cpu": TargetChoice(
        clause="onnxruntime's CPU provider",
        note="int8 kernels on onnxruntime's CPU provider",
        float_rewrites=(*_FLOAT, "patches.UNFOLD_PATCHES"),
        served_rewrites=(
            "pooled_row.COMPUTE_POOLED_ROW",
            "gelu.SEPARATE_GELU",
            "fused_attention.FUSE_ATTENTION",
            "zero_points.OMIT_ZERO_POINTS",
            "pools.CONVOLVE_POOLS",
        ),
        int4="cast",
        token_table="packed",
        two_terms=True,
    ),
    "portable": TargetChoice(
        clause="standard operators, old runtimes",
        note="standard operators only, in the lowest opset: for old runtimes and browsers, too",
        float_rewrites=(*_FLOAT, "patches.UNFOLD_PATCHES"),
        served_rewrites=(
            "pooled_row.COMPUTE_POOLED_ROW",
            "gelu.SEPARATE_GELU",
            "zero_points.OMIT_ZERO_POINTS",
            "pools.CONVOLVE_POOLS",
        ),
        int4="nibbles",
        token_table="packed",
        lowest_opset=True,
        two_terms=True,
    ),
    "tensorrt": TargetChoice(
        clause="symmetric int8, plain int4",
        note="for TensorRT's own compiler",
        float_rewrites=_FLOAT,
        served_rewrites=("pooled_row.COMPUTE_POOLED_ROW",),
        int4="native",
        token_table="float",
        symmetric=True,
        quantize_bias=False,
        reduce_range=False,
    ),
    "openvino": TargetChoice(
        clause="plain int4",
        note="for OpenVINO's own compiler",
        float_rewrites=_FLOAT,
        served_rewrites=("pooled_row.COMPUTE_POOLED_ROW",),
        int4="native",
        token_table="packed",
    ),
    "cuda": TargetChoice(
        clause="an FP16 bundle beside",
        note="the CUDA provider has no kernel for QDQ products: it dequantises and multiplies in float, slower than "
        "FP32. Serve w4a16 there, or the FP16 bundle",
        float_rewrites=_FLOAT,
        served_rewrites=(
            "pooled_row.COMPUTE_POOLED_ROW",
            "fused_attention.FUSE_ATTENTION",
            "zero_points.OMIT_ZERO_POINTS",
        ),
        int4="cast",
        token_table="folded",
        reduce_range=False,
        float16=True,
    ),
}
FLOAT16_TARGETS = ", ".join(name for name, row in TARGETS.items() if row.float16)


def in_words(rows: Mapping[str, RoundingChoice] | Mapping[str, TargetChoice]) -> str:
    """`name: clause; name: clause`, of those that have one."""
    return "; ".join(f"{name}: {row.clause}" for name, row in rows.items() if row.clause)
