"""Recipes: every choice of a run in one validated, immutable value.

Each room receives its own config, never the whole recipe; the resolved recipe goes into the manifest. `recipe_file`
reads one.
"""

from typing import TYPE_CHECKING, Literal

from pydantic import BaseModel, ConfigDict, Field, ValidationInfo, field_validator

from d4c_onnx.choices import FLOAT16_TARGETS, ROUNDINGS, TARGETS, SynthesisMethod, in_words
from d4c_onnx.errors import RecipeError
from d4c_onnx.untrusted_json import quoted, short

WEIGHT_BITS = (4, 6, 8)
ACTIVATION_BITS = (4, 6, 8, 16)


if TYPE_CHECKING:  # words that a table holds are no Literal to mypy
    TargetName = str
    RoundingName = str
else:
    TargetName = Literal[*TARGETS]
    RoundingName = Literal["auto", *ROUNDINGS]


def parse_bits(bits: str) -> tuple[int, int]:
    """Split `w4a8` into (4, 8).

    Raises:
        RecipeError: for anything that is not w<4|6|8>a<4|6|8|16>.
    """
    for weight in WEIGHT_BITS:
        for activation in ACTIVATION_BITS:
            if bits.lower() == f"w{weight}a{activation}":
                return weight, activation
    raise RecipeError(f"--bits {short(bits)}: not supported. Use w<4|6|8>a<4|6|8|16>, such as w4a8, w8a8 or w4a16.")


class _Config(BaseModel):
    model_config = ConfigDict(frozen=True, strict=True, extra="forbid", allow_inf_nan=False)


class SynthesisConfig(_Config):
    """How calibration images come into being; the constants of each method are values (`calibration.method`)."""

    method: SynthesisMethod = Field(
        "d4c",
        description="d4c: optimised images; d4c-light: whole images only, small ones for a ViT, in a fraction of the "
        "time; d4c-published: with the published switches, quirks included; bns, pse: published baselines, "
        "BatchNorm statistics (ResNets) and patch similarity entropy (ViTs); which ask no model: "
        "noise, N(0, 1) pixels; pink, 1/f noise; leaves, random textured shapes; real, images from `source`",
    )
    source: str | None = Field(
        None,
        validate_default=True,
        description="method real only: a folder of images, or a .parquet file in the Hugging Face layout",
    )
    images: int = Field(64, ge=1, le=100_000, description="calibration images")
    held_out: int = Field(16, ge=0, le=100_000, description="further images that calibration never sees, for fidelity")
    batch: int = Field(16, ge=1, le=4096, description="images that are optimised together (SCG's negatives)")
    steps: int = Field(20, ge=1, le=1_000_000, description="optimiser steps each image takes part in")
    early_stop_tolerance: float | None = Field(
        None,
        gt=0,
        description="make no more calibration images once a finished batch moves the ranges and spectra of the layers' "
        "inputs by less than this share; `images` is then the most. Not for d4c-published",
    )
    template: str = Field("a photo of a {}.", description="the prompt of a noun")
    precision: Literal["auto", "float32", "bfloat16"] = Field(
        "auto", description="of the tower's products; auto: bfloat16 where CPU or GPU multiply it, else float32"
    )

    @field_validator("source")
    @classmethod
    def _source_is_for_real(cls, source: str | None, info: ValidationInfo) -> str | None:
        if "method" in info.data and (info.data["method"] == "real") != (source is not None):
            raise ValueError("belongs to synthesis.method real, and only to it: a folder or .parquet file")
        return source

    @field_validator("early_stop_tolerance")
    @classmethod
    def _stops_between_batches(cls, tolerance: float | None, info: ValidationInfo) -> float | None:
        if tolerance is not None and info.data.get("method") == "d4c-published":
            raise ValueError("needs batches that are finished one by one; d4c-published has one optimiser for all")
        return tolerance

    @field_validator("template")
    @classmethod
    def _template_has_one_place(cls, template: str) -> str:
        if template.count("{}") != 1 or set("{}") & set(template.replace("{}", "")):
            raise ValueError(f"needs exactly one {{}}, got {quoted(template)}")
        return template


class PromptConfig(_Config):
    """Which texts calibrate the text tower."""

    prompts: int = Field(768, ge=1, le=1_000_000, description="calibration prompts; fewer where nouns are few")
    random_words: float = Field(
        0.5,
        ge=0,
        le=1,
        description="share of them whose noun is random tokens of the model's own tokenizer: words that no list has",
    )
    held_out: int = Field(128, ge=0, le=1_000_000, description="further prompts for fidelity, all with nouns")


class QuantizationConfig(_Config):
    """How both encoders are quantised."""

    bits: str = Field(
        "w4a8",
        description="w<weight bits>a<activation bits>, such as w4a8 or w8a8; a16: weights only, activations in "
        f"float16, for target {FLOAT16_TARGETS}",
    )
    target: TargetName = Field(
        "cpu", validate_default=True, description=f"where the files are served. {in_words(TARGETS)}"
    )
    rounding: RoundingName = Field(
        "auto",
        description="how weights meet their grid; auto: yaqa at w4a8, w8a8 and w4a16 (gptaq where torch is not "
        f"installed, or an operator has no gradient), else nearest; {in_words(ROUNDINGS)}",
    )
    smoothing: Literal["none", "layer_norm", "all"] = Field(
        "all",
        description="shrink outlier channels into the weights where that helps; exact. layer_norm: only behind "
        "LayerNorms; all: attention's values and the activation inside the MLP, too",
    )
    correction: Literal["none", "bias", "affine"] = Field(
        "none", description="after rounding, in closed form: bias takes up the mean error; affine a gain a channel, too"
    )
    average_bits: float | None = Field(
        None,
        ge=3.5,
        le=8,
        description="spend this many bits per weight: in groups a layer has 3, 4, 5 or 8, without them 4 or 8, by what "
        "its error does to the embeddings. none: 4.5 where w4a8 has groups, else 4",
    )
    target_cosine: float | None = Field(
        None,
        gt=0,
        le=1,
        description="find the widths of the smallest files whose towers both keep this mean cosine to FP32 on held-out "
        "images and prompts",
    )
    max_drop: float | None = Field(
        None,
        ge=0,
        description="find the widths of the smallest files whose top-1 on the labelled set falls by at most so many "
        "points",
    )
    group: Literal[0, 16, 32, 64, 128] = Field(
        16,
        description="input channels of a matrix that share a multiplier of the channel's scale, another 4 bits; "
        "0, and adaround, tensorrt and openvino anyway: one scale a channel, and no paths through a trellis",
    )
    boundary_bits: Literal[4, 6, 8] = Field(
        8, description="weight bits of the first layer, and of a final projection; a small one stays a float product"
    )
    ranges: Literal["mse", "mse-plain", "minmax"] = Field(
        "mse",
        description="how activation ranges are chosen. mse, minmax: with headroom beyond the synthetic values, which "
        "understate real ones; mse-plain: as published, without it",
    )
    reduce_range: bool | None = Field(
        None,
        description="keep the sums of neighbouring 8-bit weights within 128: x86 processors without VNNI add their "
        "products in 16 bits and saturate. none: as the target has it",
    )
    external_data: bool = Field(
        False,
        description="weights beside each graph, in <encoder>.onnx.data, which onnxruntime maps instead of copying. "
        "false: only where one file cannot hold them",
    )

    @field_validator("bits")
    @classmethod
    def _known_bits(cls, bits: str) -> str:
        try:
            weight_bits, activation_bits = parse_bits(bits)
        except RecipeError as error:
            raise ValueError(str(error)) from error
        if (weight_bits, activation_bits) == (6, 16):
            raise ValueError(f"{bits} would save no byte over w8a16. Use w4a16 or w8a16.")
        return bits

    @field_validator("target")
    @classmethod
    def _multiplies_float16(cls, target: str, info: ValidationInfo) -> str:
        bits = info.data.get("bits", "w8a8")
        if bits.lower().endswith("a16") and not TARGETS[target].float16:
            raise ValueError(
                f"{bits} keeps activations in float16, which only --target {FLOAT16_TARGETS} multiplies; this is "
                f"{target}. Use {bits[:2]}a8 there."
            )
        return target

    @field_validator("correction")
    @classmethod
    def _leaves_something_to_correct(cls, correction: str, info: ValidationInfo) -> str:
        rounding = info.data.get("rounding")
        if correction != "none" and rounding in ROUNDINGS and ROUNDINGS[rounding].learns:
            raise ValueError(f"not with {rounding}, which fits the outputs itself. Leave it out.")
        return correction

    @field_validator("average_bits")
    @classmethod
    def _buys_for_4_bits(cls, average_bits: float | None, info: ValidationInfo) -> float | None:
        bits = info.data.get("bits", "w4a8")
        if average_bits is not None and not bits.lower().startswith("w4"):
            raise ValueError(f"buys 8-bit layers for a 4-bit encoder; bits are {bits}. Leave it out.")
        return average_bits

    @field_validator("target_cosine", "max_drop")
    @classmethod
    def _chooses_the_bits(cls, promised: float | None, info: ValidationInfo) -> float | None:
        if promised is None:
            return promised
        if not info.data.get("bits", "w4a8").lower().startswith("w4"):
            raise ValueError(
                f"chooses bits between w4 and w8; bits are {info.data['bits']}. Use w4a8, or leave it out."
            )
        if info.data.get("average_bits") is not None:
            raise ValueError("finds the bits that quantization.average_bits would set. Leave one of the two out.")
        return promised

    @property
    def weight_bits(self) -> int:
        return parse_bits(self.bits)[0]

    @property
    def activation_bits(self) -> int:
        return parse_bits(self.bits)[1]

    @property
    def weights_only(self) -> bool:
        """Whether activations stay in float16."""
        return self.activation_bits == 16

    @property
    def promised(self) -> bool:
        """Whether the widths are searched for."""
        return self.target_cosine is not None or self.max_drop is not None

    @property
    def rounding_method(self) -> str:
        """`rounding`, with auto resolved.

        yaqa fits the synthetic data, activation noise included: with activations below 8 bits the noise is what it
        would mostly fit, and 8-bit weights beside float activations have little to win (docs/fidelity.md).
        """
        if self.rounding != "auto":
            return self.rounding
        fitted = (self.weight_bits, self.activation_bits) in ((4, 8), (8, 8), (4, 16))
        return "yaqa" if fitted else "nearest"

    @property
    def learns(self) -> bool:
        """Whether the rounding learns by torch's gradients."""
        return ROUNDINGS[self.rounding_method].learns

    @property
    def group_size(self) -> int:
        """`group`, where the rounding knows groups; 0: none."""
        return 0 if self.learns else self.group

    @property
    def headroom(self) -> float:
        """How far beyond the synthetic values a range is laid out; measured in docs/fidelity.md."""
        return 1.0 if self.ranges == "mse-plain" else 1.15

    @property
    def clip_weight(self) -> float:
        """How often the square error of a clipped value counts: at 4 bits the coarse step costs as much as clipping."""
        return 1.0 if self.ranges == "mse-plain" or self.activation_bits <= 4 else 10.0

    @property
    def table_bits(self) -> int:
        """Of the token table, multipliers of groups not counted."""
        return 4 if self.weight_bits == 4 else 8


class EvaluationConfig(_Config):
    """What the written files are measured on."""

    dataset: str = Field("auto", description="auto, cifar10, fidelity, or a .parquet file in the Hugging Face layout")
    batch: int = Field(100, ge=1, le=4096, description="images that are embedded at once")
    exif_rotation: bool = Field(
        False,
        description="turn real images upright first, as their EXIF entry says, those that calibrate and those that are "
        "measured on; open_clip does not",
    )
    max_drop: float | None = Field(
        None, ge=0, description="fail (exit code 1) when top-1 falls by more points than this"
    )
    min_cosine: float | None = Field(
        None, le=1, description="fail when a tower's mean cosine to FP32 is lower than this"
    )


class Recipe(_Config):
    """All sections of one run."""

    seed: int = Field(0, ge=0, lt=2**31, description="of every draw: the same one gives the same files")
    synthesis: SynthesisConfig = SynthesisConfig()
    text: PromptConfig = PromptConfig()
    quantization: QuantizationConfig = QuantizationConfig()
    evaluation: EvaluationConfig = EvaluationConfig()


# What --effort sets, by name: of the rows of docs/synthesis.md the one that asks no gradient, the default, and the
# longest that was measured.
EFFORTS: dict[str, dict[str, object]] = {
    "quick": {"synthesis.method": "leaves"},
    "default": {},
    "best": {"synthesis.images": 512, "synthesis.steps": 100},
}
