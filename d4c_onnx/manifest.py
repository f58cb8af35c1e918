"""What a bundle holds, as typed values; `manifest_file` writes and reads them.

In JSON the fields of `Quantization` stand beside the others: the file is flat.

`FORMAT` is raised when a reader of the last one could no longer do right. Formats before it are read, later ones are
refused by name. A key that only adds to what is known does not raise it: readers pass over keys that they do not know,
and do not keep them when a manifest is written again.
"""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace

from d4c_onnx.results import Accuracy, Promise
from d4c_onnx.untrusted_json import printable, short

# 2: rewrites are a list, each with what it refused; 1 had a key for each of four.
FORMAT = 2
# The one session config entry that a bundle may ask for, and its value. A manifest is not trusted, and entries are not
# harmless: `session.optimized_model_external_initializers_file_name`, for one, makes onnxruntime write any file.
# On x86 without VNNI sums of two uint8 x int8 products saturate in 16 bits; with this entry onnxruntime multiplies all
# weights by a slower kernel there. It changes nothing for others, nor on processors with VNNI.
EXACT_PRODUCTS = {"session.x64quantprecision": "1"}
# What open_clip does to a text before it falls into tokens, by its names; `runtime.cleaning` does it.
CLEANINGS = ("lower", "canonicalize", "whitespace")
# What `ModelInfo.pretrained` says of ONNX files that others exported: there are no torch weights behind them.
IMPORTED = "onnx"
# Of `Preprocess`. "random" is what open_clip calls a filter drawn in training; it serves with bicubic then.
INTERPOLATIONS = ("bicubic", "bilinear", "nearest", "lanczos", "box", "hamming", "random")
RESIZE_MODES = ("shortest", "longest", "squash")
# Means and deviations that CLIPs are published with, by who chose them.
PUBLISHED_PIXELS = {
    "OpenAI": ((0.48145466, 0.4578275, 0.40821073), (0.26862954, 0.26130258, 0.27577711)),
    "ImageNet": ((0.485, 0.456, 0.406), (0.229, 0.224, 0.225)),
    "Inception": ((0.5, 0.5, 0.5), (0.5, 0.5, 0.5)),
    "none": ((0.0, 0.0, 0.0), (1.0, 1.0, 1.0)),
}
# Far above any model, and low enough that what is allocated by them fits in memory.
LARGEST_SIDE, LONGEST_CONTEXT = 2**13, 2**17
# Far beyond what values in 0..255 would have, and such that no pixel becomes infinite in float32.
MEAN_LIMITS, STD_LIMITS = (-1e6, 1e6), (1e-6, 1e6)


@dataclass(frozen=True, slots=True)
class Resampled:
    """Position embeddings that the weights have for another image size or text length than the model.

    Attributes:
        name: the tensor's.
        stored, taken: how many positions the weights have, and how many the model takes: in between is interpolation.
    """

    name: str
    stored: int
    taken: int


@dataclass(frozen=True, slots=True)
class ModelInfo:
    """Which model, of which weights.

    Attributes:
        name: as the user gave it; of a folder or a config of one's own its name.
        pretrained: "embedded", "random", "hub", "folder", "onnx" (`IMPORTED`), a tag or a file's name.
        weights_sha256: of the torch weights, or of imported files: the same for every width of a model.
        quick_gelu: whether a tower runs QuickGELU.
        logit_scale, logit_bias: what similarities are multiplied by, and what is added; None where the model has none.
        normalized: whether embeddings have length 1.
        end_id: the end token's.
        dataset: the embedded labelled set that the model is measured on; None: none ships.
        sources: who says so, for each setting of `preprocess` and for `quick_gelu`; empty where it was not recorded.
        resampled: position embeddings that do not stand in the weights as they are used.
    """

    name: str
    pretrained: str
    weights_sha256: str
    quick_gelu: bool
    logit_scale: float | None
    logit_bias: float | None
    normalized: bool
    context_length: int
    end_id: int | None
    dataset: str | None
    sources: Mapping[str, str] = field(default_factory=dict)
    resampled: tuple[Resampled, ...] = ()

    @property
    def scale(self) -> float:
        """What similarities are multiplied by: the model's own, or CLIP's after training where it does not say."""
        return 100.0 if self.logit_scale is None else self.logit_scale


@dataclass(frozen=True, slots=True)
class Preprocess:
    """From an image to pixel_values.

    Attributes:
        size: height and width in pixels.
        mean, std: per channel, of values in 0..1.
        interpolation: a filter's name, as open_clip has it.
        resize_mode: shortest (and crop), longest (and pad), or squash.
        fill_color: 0..255, of what is padded.
    """

    size: tuple[int, int]
    mean: tuple[float, ...]
    std: tuple[float, ...]
    interpolation: str = "bicubic"
    resize_mode: str = "shortest"
    fill_color: int = 0
    channels: str = "RGB"
    value_range: tuple[float, ...] = (0.0, 1.0)


@dataclass(frozen=True, slots=True)
class TokenizerInfo:
    """From a text to input_ids.

    Attributes:
        type: `clip-bpe`, or the class of open_clip's wrapper.
        context_length: where texts are cut.
        cleaning: what is done to a text before, and by whom, in words.
        clean: open_clip's name of it, one of `CLEANINGS`, for `runtime.tokenizer`, which does it; None in bundles made
            before that: it is left to the client.
        sot_id, eot_id, pad_id: start, end and padding; None where unknown.
        causal: whether a token sees those before it only.
        dynamic_sequence: whether the text encoder takes any length up to the context's, padded with `pad_id` behind.
        why_fixed: why it takes none but the context's, where its tower could have taken any.
        has_file: False: the bundle has no tokenizer.json, because the tokenizer has no such form.
        zeroed_id: a token that becomes 0 wherever it stands (open_clip's `strip_sep_token`).
        last_id: a token behind the padding, at the end of the context (open_clip's mode `clips`).
    """

    type: str
    context_length: int
    cleaning: str
    sot_id: int | None = None
    eot_id: int | None = None
    pad_id: int | None = None
    causal: bool = False
    dynamic_sequence: bool = False
    has_file: bool = True
    why_fixed: str | None = None
    clean: str | None = None
    zeroed_id: int | None = None
    last_id: int | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        ids = {name: getattr(self, name) for name in ("sot_id", "eot_id", "pad_id", "zeroed_id", "last_id")}
        return {
            "type": self.type,
            "context_length": self.context_length,
            **{name: value for name, value in ids.items() if value is not None},
            "cleaning": self.cleaning,
            **({} if self.clean is None else {"clean": self.clean}),
            **({} if self.has_file else {"file": None}),
            "causal": self.causal,
            "dynamic_sequence": self.dynamic_sequence,
            **({} if self.why_fixed is None else {"why_fixed": self.why_fixed}),
        }


@dataclass(frozen=True, slots=True)
class TensorInfo:
    """An input or output of a file: its name, numpy's name of its type, and sizes or names of its axes."""

    name: str
    dtype: str
    shape: tuple[int | str, ...]

    def __str__(self) -> str:
        return f"{self.name} {self.dtype} [{', '.join(map(str, self.shape))}]"

    @property
    def sizes(self) -> tuple[int | None, ...]:
        """Of the axes; None for one of any length, whatever it is called."""
        return tuple(size if isinstance(size, int) and size else None for size in self.shape)

    def alike(self, other: "TensorInfo") -> bool:
        """Whether another one is the same but for the names of axes of any length."""
        return (self.name, self.dtype, self.sizes) == (other.name, other.dtype, other.sizes)


@dataclass(frozen=True, slots=True)
class Signature:
    """What a file takes and gives, and its opset."""

    inputs: tuple[TensorInfo, ...]
    outputs: tuple[TensorInfo, ...]
    opset: int

    def difference(self, inputs: Sequence[TensorInfo], outputs: Sequence[TensorInfo]) -> str:
        """In words, how inputs and outputs that were found in a file differ from these; empty where they do not."""
        faults = []
        for what, found, told in (("inputs", inputs, self.inputs), ("outputs", outputs, self.outputs)):
            if len(found) != len(told) or not all(map(TensorInfo.alike, found, told)):
                own, said = (", ".join(map(str, values)) or "none" for values in (found, told))
                faults.append(f"its {what} are {short(printable(own))}, the manifest says {short(printable(said))}")
        return "; ".join(faults)


@dataclass(frozen=True, slots=True)
class FileRecord:
    """One file of the bundle."""

    sha256: str
    size_bytes: int


@dataclass(frozen=True, slots=True)
class Session:
    """What the files were measured with, and what sessions need beside onnxruntime's defaults."""

    graph_optimization_level: str = "ORT_ENABLE_ALL"
    config_entries: Mapping[str, str] = field(default_factory=dict)


@dataclass(frozen=True, slots=True)
class OptimizerRecord:
    """What onnxruntime's optimiser does to embeddings; see `runtime.optimizer.OptimizerEffect`."""

    optimizer: float
    literal: float
    optimized: float
    ratio: float
    certain: float


@dataclass(frozen=True, slots=True)
class LayerRecord:
    """A layer with a stored weight: its operator, bits a weight, and how many weights."""

    op: str
    bits: float
    weights: int


@dataclass(frozen=True, slots=True)
class Refusal:
    """A place where a rewrite did not apply, and why."""

    place: str
    reason: str


@dataclass(frozen=True, slots=True)
class RewriteRecord:
    """A rewrite of the graph: in how many places it applied, and where it did not."""

    name: str
    count: int
    refused: tuple[Refusal, ...] = ()


@dataclass(frozen=True, slots=True)
class EncoderRecord:
    """How one encoder was quantised.

    Attributes:
        layers: by node.
        token_table_bits: multipliers of groups included; None without a token table, or where it stays float.
        quantized_activations: how many.
        smoothing_alpha: per smoothed place, by the node that makes the activation.
        start_token_pinned: whether the start token's keys and values are constants of the file.
        minimum_onnxruntime: the oldest release that loads the file.
        rewrites: in the order in which they were tried.
    """

    layers: Mapping[str, LayerRecord]
    token_table_bits: float | None
    quantized_activations: int
    smoothing_alpha: Mapping[str, float]
    start_token_pinned: bool
    minimum_onnxruntime: str
    rewrites: tuple[RewriteRecord, ...] = ()

    def applied(self, rewrite: str) -> int:
        """In how many places a rewrite applied."""
        return sum(entry.count for entry in self.rewrites if entry.name == rewrite)


@dataclass(frozen=True, slots=True)
class Quantization:
    """How a bundle was made from the FP32 one; FP16 is a width, too.

    Attributes:
        bits: such as w4a8, or fp16.
        target, target_note: where the files are served, and what to expect there.
        recipe: the resolved one; of an FP16 bundle what it depends on.
        minimum_onnxruntime: the oldest release that loads both files.
        accuracy_mode_only: whether the widths are simulated: answers of such a device, speed of int8.
        source_files: SHA-256 of the FP32 encoders.
        session: what the files are served with.
        optimizer_effect, encoders: by file.
        weight_bits_average: stored bits a weight, over both files.
        calibration, calibration_seed: the calibration set's id and seed.
        accuracy: None until it is measured.
        promise: what the widths were searched for; None where they were given.
    """

    bits: str
    target: str
    target_note: str
    recipe: Mapping[str, object]
    minimum_onnxruntime: str
    accuracy_mode_only: bool
    source_files: Mapping[str, str]
    session: Session = field(default_factory=Session)
    optimizer_effect: Mapping[str, OptimizerRecord] = field(default_factory=dict)
    weight_bits_average: float | None = None
    encoders: Mapping[str, EncoderRecord] = field(default_factory=dict)
    calibration: str | None = None
    calibration_seed: int | None = None
    accuracy: Accuracy | None = None
    promise: Promise | None = None

    def as_dict(self) -> dict[str, object]:
        """For JSON: what an FP16 bundle or an unmeasured one does not have is left out."""
        content = asdict(replace(self, accuracy=None, promise=None))
        if self.promise is not None:
            content["promise"] = self.promise.as_dict()
        if self.accuracy is not None:
            content["accuracy"] = self.accuracy.as_dict()
        return {key: value for key, value in content.items() if value is not None and (value or key != "encoders")}


@dataclass(frozen=True, slots=True)
class Manifest:
    """What a bundle holds.

    Attributes:
        io: by encoder file.
        seed: of the export; of a quantised bundle, the recipe's.
        parity_max_abs_difference: by tower, how far an FP32 file is from torch.
        quantization: None in FP32.
        versions: of the packages that shaped the files; and
        files: by name, `golden/` included; both are filled in when it is written.
    """

    model: ModelInfo
    preprocess: Preprocess
    tokenizer: TokenizerInfo
    io: Mapping[str, Signature]
    seed: int
    parity_max_abs_difference: Mapping[str, float] | None = None
    quantization: Quantization | None = None
    versions: Mapping[str, str] = field(default_factory=dict)
    files: Mapping[str, FileRecord] = field(default_factory=dict)

    @property
    def bits(self) -> str:
        """fp32, fp16, w4a8, ..."""
        return self.quantization.bits if self.quantization else "fp32"

    def measured(self, accuracy: Accuracy) -> "Manifest":
        """This manifest of a quantised bundle with the accuracy that was measured."""
        assert self.quantization is not None
        return replace(self, quantization=replace(self.quantization, accuracy=accuracy))

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        parity = self.parity_max_abs_difference
        return {
            "format": FORMAT,
            "kind": "quantized" if self.quantization else "fp32",
            "model": asdict(self.model),
            "preprocess": asdict(self.preprocess),
            "tokenizer": self.tokenizer.as_dict(),
            "io": {name: asdict(entry) for name, entry in self.io.items()},
            "seed": self.seed,
            **({} if parity is None else {"parity_max_abs_difference": dict(parity)}),
            **(self.quantization.as_dict() if self.quantization else {}),
            "versions": dict(self.versions),
            "files": {name: asdict(entry) for name, entry in self.files.items()},
        }
