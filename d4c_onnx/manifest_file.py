"""`manifest.json`: the one writer and the one reader.

A bundle may come from anywhere, so the reader takes nothing on trust: every field has a type and a range, files lie in
the bundle's own folder, and sessions may be asked for one known setting only.
"""

import json
import os
from dataclasses import replace
from importlib import metadata
from pathlib import Path
from typing import Any

from d4c_onnx.errors import BundleError
from d4c_onnx.files import sha256, write_json
from d4c_onnx.manifest import (
    CLEANINGS,
    EXACT_PRODUCTS,
    FORMAT,
    INTERPOLATIONS,
    LARGEST_SIDE,
    LONGEST_CONTEXT,
    MEAN_LIMITS,
    RESIZE_MODES,
    STD_LIMITS,
    EncoderRecord,
    FileRecord,
    LayerRecord,
    Manifest,
    ModelInfo,
    OptimizerRecord,
    Preprocess,
    Quantization,
    Refusal,
    Resampled,
    RewriteRecord,
    Session,
    Signature,
    TensorInfo,
    TokenizerInfo,
)
from d4c_onnx.ownership import MANIFEST as MANIFEST  # what a manifest is called, for all who read one
from d4c_onnx.results import Accuracy, BundleAccuracy, PairedDifference, Promise, PromiseTry, Versus
from d4c_onnx.untrusted_json import (
    Node,
    flag,
    integer,
    mapping,
    measured_number,
    nullable,
    number,
    one_of,
    quoted,
    read_json,
    real,
    recorded,
    sequence,
    sha256_text,
    text,
)

# The one sub-folder that belongs to a bundle; others are calibration sets and bundles of other widths.
GOLDEN_FOLDER = "golden"
_COUNTED_IN_1 = ("pooled_row_only", "fused_attention", "fused_biases", "fused_qkv")
_VERSIONED = ("d4c-onnx", "torch", "open_clip_torch", "onnx", "onnxruntime", "onnxscript", "numpy", "tokenizers")
# A manifest names a data set that ships, never a file.
_EMBEDDED_SETS = ("cifar10",)


def write_manifest(folder: Path, manifest: Manifest) -> Manifest:
    """Hash the files of `folder` and write its manifest.

    Args:
        folder: a bundle's, whose other files are complete; sub-folders but `golden/` are no part of it.
        manifest: its files are hashed anew; where it names none, all of the folder's are, so that what lies in a
            finished bundle and is not part of it stays so. Versions are taken where it has none: what wrote the files
            stays what it was.

    Returns:
        What was written, as it reads back.

    Raises:
        BundleError: the disk is full, the place cannot be written, or the reader would refuse a value.
    """
    found = [folder / name for name in manifest.files] or [*folder.iterdir(), *(folder / GOLDEN_FOLDER).glob("*")]
    files = {
        file.relative_to(folder).as_posix(): FileRecord(sha256(file), file.stat().st_size)
        for file in sorted(found)
        if file.is_file() and file.name != MANIFEST
    }
    content = replace(manifest, versions=manifest.versions or versions(), files=files).as_dict()
    # read first: what the reader refuses must not take the place of a manifest that is good
    read = _manifest(Node(json.loads(json.dumps(content)), folder / MANIFEST))
    write_json(folder / MANIFEST, content)
    return read


def versions() -> dict[str, str]:
    """Versions of the packages that shape the files; read from metadata, nothing is imported."""
    found = {}
    for name in _VERSIONED:
        try:
            found[name] = metadata.version(name)
        except metadata.PackageNotFoundError:
            continue
    return found


def read_manifest(folder: Path) -> Manifest:
    """The manifest of a bundle folder; whether the files are as it says is not looked at.

    Raises:
        BundleError: it cannot be read, is of a newer format, or a field is not what it may be.
    """
    return _manifest(read_json(folder / MANIFEST))


def _manifest(top: Node) -> Manifest:
    written_in = top.take("format", integer(1))
    if written_in > FORMAT:
        raise BundleError(f"{top.file}: format {written_in}, this d4c-onnx reads up to {FORMAT}: update d4c-onnx.")
    quantized = top.take("kind", one_of("fp32", "quantized")) == "quantized"
    session = top.take("session", _session, None)  # first, and in FP32, too: what is harmful is called so
    return Manifest(
        model=top.take("model", _model),
        preprocess=top.take("preprocess", preprocess_of),
        tokenizer=top.take("tokenizer", tokenizer_of),
        io=top.take("io", mapping(_signature, file_name)),
        seed=top.take("seed", integer(0)),
        parity_max_abs_difference=top.take("parity_max_abs_difference", nullable(mapping(number)), None),
        quantization=_quantization(top, written_in, session) if quantized else None,
        versions=top.take("versions", mapping(text)),
        files=top.take("files", mapping(file_of, file_name)),
    )


def file_name(node: Node) -> str:
    """A name in the bundle's folder or in `golden/`: no path, which could lead elsewhere."""
    name = text(node).removeprefix(f"{GOLDEN_FOLDER}/")
    if name in ("", ".", "..") or not {"/", "\\", ":"}.isdisjoint(name) or len(os.fsencode(name)) > 255:
        raise node.wrong(f"a file's name, in the bundle's folder or in {GOLDEN_FOLDER}/")
    return str(node.value)


def _model(node: Node) -> ModelInfo:
    return ModelInfo(
        name=node.take("name", text),
        pretrained=node.take("pretrained", text),
        weights_sha256=node.take("weights_sha256", sha256_text),
        quick_gelu=node.take("quick_gelu", flag),
        logit_scale=node.take("logit_scale", nullable(number)),
        logit_bias=node.take("logit_bias", nullable(number)),
        normalized=node.take("normalized", flag),
        context_length=node.take("context_length", integer(1, LONGEST_CONTEXT)),
        end_id=node.take("end_id", nullable(_token)),
        dataset=node.take("dataset", nullable(one_of(*_EMBEDDED_SETS))),
        sources=node.take("sources", mapping(text), {}),
        resampled=node.take("resampled", sequence(_resampled), ()),
    )


def _resampled(node: Node) -> Resampled:
    return Resampled(node.take("name", text), node.take("stored", integer(1)), node.take("taken", integer(1)))


def preprocess_of(node: Node) -> Preprocess:
    """How images become pixels."""
    height, width = node.take("size", sequence(integer(1, LARGEST_SIDE), 2))
    return Preprocess(
        size=(height, width),
        mean=node.take("mean", sequence(real(*MEAN_LIMITS), 3)),
        std=node.take("std", sequence(real(*STD_LIMITS), 3)),
        interpolation=node.take("interpolation", one_of(*INTERPOLATIONS)),
        resize_mode=node.take("resize_mode", one_of(*RESIZE_MODES)),
        fill_color=node.take("fill_color", integer(0, 255)),
        channels=node.take("channels", one_of("RGB")),
        value_range=node.take("value_range", sequence(number, 2)),
    )


def tokenizer_of(node: Node) -> TokenizerInfo:
    """How texts become ids."""
    return TokenizerInfo(
        type=node.take("type", text),
        context_length=node.take("context_length", integer(1, LONGEST_CONTEXT)),
        cleaning=node.take("cleaning", text),
        sot_id=node.take("sot_id", nullable(_token), None),
        eot_id=node.take("eot_id", nullable(_token), None),
        pad_id=node.take("pad_id", nullable(_token), None),
        causal=node.take("causal", flag),
        dynamic_sequence=node.take("dynamic_sequence", flag),
        has_file=node.take("file", nullable(text), "tokenizer.json") is not None,
        why_fixed=node.take("why_fixed", nullable(text), None),
        clean=node.take("clean", nullable(one_of(*CLEANINGS)), None),
        zeroed_id=node.take("zeroed_id", nullable(_token), None),
        last_id=node.take("last_id", nullable(_token), None),
    )


_token = integer(0, 2**31 - 1)


def _signature(node: Node) -> Signature:
    one = sequence(tensor_of, 1)
    return Signature(node.take("inputs", one), node.take("outputs", one), node.take("opset", integer(1)))


def tensor_of(node: Node) -> TensorInfo:
    """An input or output."""

    def axis(size: Node) -> int | str:
        return text(size) if isinstance(size.value, str) else integer(0)(size)

    return TensorInfo(node.take("name", text), node.take("dtype", text), node.take("shape", sequence(axis)))


def file_of(node: Node) -> FileRecord:
    """A file's hash and size."""
    return FileRecord(node.take("sha256", sha256_text), node.take("size_bytes", integer(0)))


def _quantization(top: Node, written_in: int, session: Session | None) -> Quantization:
    if session is None:
        raise top.wrong("an object with session")
    return Quantization(
        bits=top.take("bits", text),
        target=top.take("target", text),
        target_note=top.take("target_note", text),
        recipe=top.take("recipe", mapping(recorded)),
        minimum_onnxruntime=top.take("minimum_onnxruntime", text),
        accuracy_mode_only=top.take("accuracy_mode_only", flag),
        source_files=top.take("source_files", mapping(sha256_text, file_name)),
        session=session,
        optimizer_effect=top.take("optimizer_effect", mapping(_optimizer, file_name)),
        weight_bits_average=top.take("weight_bits_average", nullable(number), None),
        encoders=top.take("encoders", mapping(_encoder_of(written_in), file_name), {}),
        calibration=top.take("calibration", nullable(text), None),
        calibration_seed=top.take("calibration_seed", nullable(integer(0)), None),
        accuracy=top.take("accuracy", nullable(_accuracy), None),
        promise=top.take("promise", nullable(_promise), None),
    )


def _session(node: Node) -> Session:
    """Only what d4c-onnx itself writes."""
    entries = node.take("config_entries", mapping(recorded))
    for key, value in entries.items():
        if EXACT_PRODUCTS.get(key) != value:
            raise BundleError(
                f"{node.file}, session.config_entries: {quoted({key: value})} is nothing that d4c-onnx writes, and may "
                f"be harmful (allowed: {EXACT_PRODUCTS}). Do not use this bundle, or remove the entry if you know why "
                "it is there."
            )
    return Session(node.take("graph_optimization_level", text, Session().graph_optimization_level), entries)


def _optimizer(node: Node) -> OptimizerRecord:
    names = ("optimizer", "literal", "optimized", "ratio", "certain")
    return OptimizerRecord(*(node.take(name, measured_number) for name in names))


def _encoder_of(written_in: int) -> Any:
    """The reader of an encoder's record as a format has it."""

    def read(node: Node) -> EncoderRecord:
        return EncoderRecord(
            layers=node.take("layers", mapping(_layer)),
            token_table_bits=node.take("token_table_bits", nullable(_width)),
            quantized_activations=node.take("quantized_activations", integer(0)),
            smoothing_alpha=node.take("smoothing_alpha", mapping(number)),
            start_token_pinned=node.take("start_token_pinned", flag),
            minimum_onnxruntime=node.take("minimum_onnxruntime", text),
            rewrites=_rewrites_of_1(node) if written_in == 1 else node.take("rewrites", sequence(_rewrite), ()),
        )

    return read


def _rewrites_of_1(node: Node) -> tuple[RewriteRecord, ...]:
    def count(value: Node) -> int:
        return int(flag(value)) if isinstance(value.value, bool) else integer(0)(value)

    counts = ((name, node.take(name, count, 0)) for name in _COUNTED_IN_1)
    return tuple(RewriteRecord(name, found) for name, found in counts if found)


def _rewrite(node: Node) -> RewriteRecord:
    refused = node.take("refused", sequence(_refusal), ())
    return RewriteRecord(node.take("name", text), node.take("count", integer(0)), refused)


def _refusal(node: Node) -> Refusal:
    return Refusal(node.take("place", text), node.take("reason", text))


def _layer(node: Node) -> LayerRecord:
    return LayerRecord(node.take("op", text), node.take("bits", _width), node.take("weights", integer(0)))


def _width(node: Node) -> float:
    """Bits a weight; its share of a multiplier is a fraction of one."""
    width = number(node)
    if not 1 <= width <= 64:
        raise node.wrong("a number from 1 to 64")
    return int(width) if width.is_integer() else width


def _accuracy(node: Node) -> Accuracy:
    return Accuracy(
        kind=node.take("kind", one_of("zero-shot", "fidelity")),
        images=node.take("images", integer(0)),
        bundles=node.take("bundles", sequence(_bundle_accuracy)),
        dataset=node.take("dataset", nullable(text), None),
        prompts=node.take("prompts", nullable(integer(0)), None),
    )


def _promise(node: Node) -> Promise:
    return Promise(
        target_cosine=node.take("target_cosine", nullable(number), None),
        max_drop=node.take("max_drop", nullable(number), None),
        tries=node.take("tries", sequence(_promise_try)),
        chosen=node.take("chosen", nullable(_promise_try), None),
    )


def _promise_try(node: Node) -> PromiseTry:
    return PromiseTry(
        image=node.take("image", text),
        text=node.take("text", text),
        weight_bits_average=node.take("weight_bits_average", number),
        size_bytes=node.take("size_bytes", integer(0)),
        cosine_image=node.take("cosine_image", nullable(measured_number), None),
        cosine_text=node.take("cosine_text", nullable(measured_number), None),
        top1_lost=node.take("top1_lost", nullable(measured_number), None),
    )


def _bundle_accuracy(node: Node) -> BundleAccuracy:
    return BundleAccuracy(
        bundle=node.take("bundle", text),
        top1=node.take("top1", nullable(measured_number), None),
        top5=node.take("top5", nullable(measured_number), None),
        versus_first=node.take("versus_first", nullable(_versus), None),
    )


def _versus(node: Node) -> Versus:
    return Versus(
        agreement=node.take("agreement", measured_number),
        cosine_image=node.take("cosine_image", measured_number),
        cosine_text=node.take("cosine_text", measured_number),
        similarity_rmse=node.take("similarity_rmse", measured_number),
        top1_difference=node.take("top1_difference", nullable(_difference), None),
        cosine_image_least=node.take("cosine_image_least", nullable(measured_number), None),
        cosine_text_least=node.take("cosine_text_least", nullable(measured_number), None),
    )


def _difference(node: Node) -> PairedDifference:
    return PairedDifference(*(node.take(name, measured_number) for name in ("points", "low", "high")))
