"""What stacks take for granted, asked of a bundle before its files stand; what they lack is a reason to refuse."""

from __future__ import annotations

from d4c_onnx.manifest import PUBLISHED_PIXELS
from d4c_onnx.packaging.edits import LooseLayout
from d4c_onnx.packaging.job import Job, is_external
from d4c_onnx.runtime.preprocess import filter_of
from d4c_onnx.untrusted_json import short


def unit_vectors(job: Job) -> None:
    """Raises BundleError: the embeddings are raw, and the stack compares them as they come."""
    if not job.bundle.manifest.model.normalized:
        raise job.refusal("compares embeddings as they come, and these are not normalised (export without --raw)")


def tokenizer_file(job: Job, alone: bool = True) -> None:
    """Raises BundleError: the bundle has no tokenizer.json; or the stack reads it `alone`, which is not enough."""
    info = job.tokenizer
    if not info.has_file:
        raise job.refusal(f"reads tokenizer.json, and this model's tokenizer has no such form ({short(info.cleaning)})")
    if alone and (info.zeroed_id is not None or info.last_id is not None):
        raise job.refusal(f"reads tokenizer.json alone, which cannot express this tokenizer ({short(info.type)})")


def byte_pairs(job: Job) -> None:
    """Raises BundleError: the tokenizer is not CLIP's, and the stack knows no other."""
    if job.tokenizer.type != "clip-bpe":
        raise job.refusal(f"knows CLIP's byte-pair tokenizer only, and this model's is {short(job.tokenizer.type)}")


def square(job: Job) -> None:
    """Raises BundleError: the image encoder takes no squares, and the stack makes nothing else."""
    height, width = job.preprocess.size
    if height != width:
        raise job.refusal(f"makes square images only, and this model takes {height} x {width}")


def size(job: Job, side: int) -> None:
    """Raises BundleError: the image encoder takes images of another size than the stack makes."""
    height, width = job.preprocess.size
    if (height, width) != (side, side):
        raise job.refusal(f"makes images of {side} x {side} pixels, and this model takes {height} x {width}")


def dimensions(job: Job, count: int) -> None:
    """Raises BundleError: embeddings have other dimensions than the stack stores."""
    if job.dimensions != count:
        raise job.refusal(f"stores {count} numbers an embedding, and this model gives {job.dimensions}")


def no_padding_of_images(job: Job) -> None:
    """Raises BundleError: images are padded, which the stack cannot do."""
    if job.preprocess.resize_mode == "longest":
        raise job.refusal("crops or squashes images, and this model's are padded (resize mode longest)")


def pixels_of_clip(job: Job) -> None:
    """Raises BundleError: the stack reads no config, and its pixels, which are CLIP's, are not this model's."""
    config = job.preprocess
    published = [value for channel in PUBLISHED_PIXELS["OpenAI"] for value in channel]
    if any(abs(ours - its) > 1e-4 for ours, its in zip((*config.mean, *config.std), published, strict=True)):
        raise job.refusal("makes pixels with CLIP's mean and deviation, and this model's are others")
    if (config.resize_mode, filter_of(config)) != ("shortest", "bicubic"):
        kind = short(f"{config.resize_mode}, {filter_of(config)}")
        raise job.refusal(f"resizes the shorter side by a bicubic filter and crops, and this model wants {kind}")


def longest_text(job: Job, most: int) -> None:
    """Raises BundleError: the stack cuts rows, end token and all, before they are as long as the tower takes."""
    if job.tokenizer.context_length > most:
        raise job.refusal(f"cuts texts at {most} ids, and this model takes {job.tokenizer.context_length}")


def context(job: Job, most: int) -> None:
    """Raises BundleError: the stack feeds rows of one length, and the tower takes another."""
    if job.tokenizer.context_length != most:
        raise job.refusal(f"feeds {most} ids a text, and this model takes {job.tokenizer.context_length}")


def one_file(job: Job) -> None:
    """Raises BundleError: a model that was written has its weights beside it, and browsers load one file a model."""
    if any(is_external(job.folder, model) for model in job.models):
        raise job.refusal("loads one file a model in browsers, and these weights need a second one (quantise first)")


def remark_on_release(job: Job) -> None:
    """From which release of onnxruntime on the files load, where they lie as the bundle's do."""
    quantization = job.bundle.manifest.quantization
    if quantization is not None and not any(LooseLayout().words in model.edits for model in job.models):
        job.remarks.append(f"needs onnxruntime {short(quantization.minimum_onnxruntime)} or newer where that runs it.")
