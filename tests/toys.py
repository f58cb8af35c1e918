"""Bundles of any size and kind in a moment: towers of a few nodes with a 4-bit weight each, a tokenizer of letters.

The text tower adds up the rows of all tokens before the first end token and maps the sum; without an end token it reads
the first token only, as CLIP's does.
"""

import json
from dataclasses import dataclass, replace
from pathlib import Path

import ml_dtypes
import numpy as np
import onnx_ir as ir
from graphs import parse
from tokenizers import Tokenizer, models, pre_tokenizers, processors

from d4c_onnx.bundle import IMAGE_ENCODER, TEXT_ENCODER, TOKENIZER, Bundle
from d4c_onnx.graph.model import save_model, signature_of
from d4c_onnx.manifest import PUBLISHED_PIXELS, Manifest, ModelInfo, Preprocess, Quantization, TokenizerInfo
from d4c_onnx.manifest_file import write_manifest
from d4c_onnx.runtime.golden import Bounds, write_golden

LETTERS = "abcdefghijklmnopqrstuvwxyz"
START, END, PAD = len(LETTERS), len(LETTERS) + 1, 0
MERGES = ("th", "in")
VOCABULARY = {
    **{letter: index for index, letter in enumerate(LETTERS)},
    "<start>": START,
    "<end>": END,
    "th": 28,
    "in": 29,
}


@dataclass(frozen=True)
class Toy:
    """What a toy is made with."""

    side: tuple[int, int] = (8, 8)
    dimensions: int = 4
    context: int = 8
    dynamic: bool = True
    bits: str = "w4a8"
    name: str = "toy"
    pretrained: str = "random"
    normalized: bool = True
    logit_scale: float | None = 10.0
    logit_bias: float | None = None
    resize_mode: str = "shortest"
    interpolation: str = "bicubic"
    mean: tuple[float, ...] = (0.5,) * 3
    std: tuple[float, ...] = (0.25,) * 3
    type: str = "clip-bpe"
    has_file: bool = True
    last_id: int | None = None


def fitting(stack: str) -> Toy:
    """A toy that the stack can serve."""
    return changed(Toy(), **_FITTING.get(stack, {}))


CLIPS_PIXELS = dict(zip(("mean", "std"), PUBLISHED_PIXELS["OpenAI"], strict=True))
_FITTING: dict[str, dict[str, object]] = {
    "immich": {"dimensions": 512, "name": "ViT-B-32", "pretrained": "laion2b_s34b_b79k"},
    "librephotos": {"dimensions": 512, "side": (224, 224), **CLIPS_PIXELS},
    "rclip": {"dimensions": 512, "side": (256, 256), "context": 77, **CLIPS_PIXELS},
    "frigate": {"dimensions": 768},
}


def bundle_of(folder: Path, toy: Toy) -> Bundle:
    """Write a toy."""
    folder.mkdir(parents=True)
    rng = np.random.default_rng(0)
    towers = {IMAGE_ENCODER: _image(toy, rng), TEXT_ENCODER: _text(toy, rng)}
    for name, model in towers.items():
        save_model(model, folder / name)
    write_tokenizer(folder / TOKENIZER, toy)
    preprocess = Preprocess(toy.side, toy.mean, toy.std, toy.interpolation, toy.resize_mode)
    tokenizer = TokenizerInfo(
        toy.type, toy.context, "none", START, END, PAD, True, toy.dynamic, toy.has_file, last_id=toy.last_id
    )
    rest = [PAD] * (0 if toy.dynamic else toy.context - 4)
    texts = [("df", [START, 3, 5, END, *rest]), ("dd", [START, 3, 3, END, *rest])]
    files = folder / IMAGE_ENCODER, folder / TEXT_ENCODER
    write_golden(folder, files, preprocess, texts, Bounds(1e-3, 1e-3), tokenizer)
    quantized = Quantization(toy.bits, "cpu", "", {}, "1.23", False, {})
    manifest = Manifest(
        model=_info(toy),
        preprocess=preprocess,
        tokenizer=tokenizer,
        io={name: signature_of(model) for name, model in towers.items()},
        seed=0,
        quantization=None if toy.bits == "fp32" else quantized,
    )
    if not toy.has_file:
        (folder / TOKENIZER).unlink()
    return Bundle(folder, write_manifest(folder, manifest))


def _info(toy: Toy) -> ModelInfo:
    scale, bias = toy.logit_scale, toy.logit_bias
    return ModelInfo(
        toy.name, toy.pretrained, "a" * 64, False, scale, bias, toy.normalized, toy.context, END, dataset=None
    )


def changed(toy: Toy, **values: object) -> Toy:
    """The toy with other values."""
    return replace(toy, **values)  # type: ignore[arg-type]


def write_tokenizer(path: Path, toy: Toy) -> None:
    """A tokenizer.json that cuts and pads as those of bundles do."""
    merges = [tuple(pair) for pair in MERGES]
    made = Tokenizer(models.BPE(VOCABULARY, merges, unk_token="a"))
    made.pre_tokenizer = pre_tokenizers.Whitespace()
    ends = [("<start>", START), ("<end>", END)]
    made.post_processor = processors.TemplateProcessing(single="<start> $A <end>", special_tokens=ends)
    made.add_special_tokens(["<start>", "<end>"])
    made.enable_truncation(toy.context)
    made.enable_padding(pad_id=PAD, pad_token="a", length=None if toy.dynamic else toy.context)
    made.save(str(path))


def tokens(lengths: list[int], ended: bool = True) -> np.ndarray:
    """Rows of letters, int64 [rows, longest], padded; each with its end token unless `ended` is False."""
    rng = np.random.default_rng(1)
    rows = np.full((len(lengths), max(lengths)), PAD, np.int64)
    for row, length in zip(rows, lengths, strict=True):
        row[:length] = [START, *rng.integers(1, START, length - 2), END if ended else 1]
    return rows


def right(ids: np.ndarray, context: int) -> np.ndarray:
    """What open_clip's tokenizer makes of rows that are too long."""
    cut = ids[:, :context].copy()
    for row in cut:
        if END not in row and len(row) == context:
            row[-1] = END
    return cut


def _image(toy: Toy, rng: np.random.Generator) -> ir.Model:
    pixels = ", ".join(map(str, ("batch", 3, *toy.side)))
    text = f"""image (float[{pixels}] pixel_values) => (float[batch, {toy.dimensions}] image_embeds) {{
        [mean] pooled = ReduceMean<keepdims = 0>(pixel_values, axes)
        {_MAPPED.format("image_embeds")}
    }}"""
    return _mapped(text, 3, toy, rng, axes=[2, 3])


def _text(toy: Toy, rng: np.random.Generator) -> ir.Model:
    length = "sequence" if toy.dynamic else toy.context
    flat, mixed = ("pooled", "") if toy.dynamic else ("flat", _WHOLE)
    text = f"""text (int64[batch, {length}] input_ids) => (float[batch, {toy.dimensions}] text_embeds) {{
        [rows] rows = Gather(table, input_ids)
        [sums] sums = CumSum(rows, axis)
        [ends] ends = Equal(input_ids, end_id)
        [ones] ones = Cast<to = 6>(ends)
        [first] first = ArgMax<axis = 1, keepdims = 1>(ones)
        [place] place = Concat<axis = 1>(first)
        [last_sums] at_end = GatherND<batch_dims = 1>(sums, place)
        [flat] {flat} = Reshape(at_end, pair)
        {mixed}
        {_MAPPED.format("text_embeds")}
    }}"""
    table = rng.standard_normal((len(VOCABULARY), 6))
    known = {"table": table, "axis": np.array(1), "end_id": np.array(END), "pair": [-1, 6]}
    if not toy.dynamic:
        known |= {"whole": [-1, toy.context, 6], "over": [1, 2], "tiny": 0.01, "last": [-1]}
    return _mapped(text, 6, toy, rng, **known)


# A tower that has read its whole context: rows of another length do not fit.
_WHOLE = """[whole] whole_rows = Reshape(rows, whole)
        [total] total = ReduceSum(whole_rows, over)
        [tiny] tiny_total = Mul(total, tiny)
        [line] line = Squeeze(tiny_total, last)
        [mixed] pooled = Add(flat, line)"""
# A 4-bit weight in the form that Casts unpack, and unit vectors.
_MAPPED = """[weight_cast] weight = Cast<to = 3>(weight_int4)
        [real] real = DequantizeLinear(weight, scale, zero)
        [product] product = MatMul(pooled, real)
        [unit] {} = LpNormalization<axis = -1, p = 2>(product)"""


def _mapped(text: str, width: int, toy: Toy, rng: np.random.Generator, **constants: object) -> ir.Model:
    integers = rng.integers(-8, 8, (width, toy.dimensions)).astype(ml_dtypes.int4)
    return parse(text, weight_int4=integers, scale=[0.1], zero=np.array([0], np.int8), **constants)


def json_of(path: Path) -> dict[str, object]:
    """A JSON file."""
    return json.loads(path.read_text("utf-8"))
