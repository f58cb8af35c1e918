"""Frigate's semantic search: files under the names of jina-clip-v1, which it would download.

Its onnxruntime (1.22) has no Cast from INT4: nibbles. It cuts no texts: the guard. Sessions are opened at a level of
optimisation that has no int8 kernels.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.edits import LooseLayout
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_FOLDER, _DIMENSIONS = "model_cache/jinaai/jina-clip-v1", 768
_CACHE = f"{_FOLDER}/tokenizer/models--jinaai--jina-clip-v1"  # a tree as huggingface_hub makes it


def _write(job: Job) -> None:
    needs.dimensions(job, _DIMENSIONS)
    needs.square(job)
    needs.no_padding_of_images(job)
    needs.tokenizer_file(job)
    job.encoder("image", f"{_FOLDER}/vision_model_quantized.onnx", LooseLayout())
    job.encoder("text", f"{_FOLDER}/text_model_fp16.onnx", LooseLayout(), *job.guard())
    job.json(f"{_FOLDER}/preprocessor_config.json", configs.preprocessor_config(job))
    revision = job.bundle.weights_sha256[:40]
    job.text(f"{_CACHE}/refs/main", revision)
    configs.write_texts(job, f"{_CACHE}/snapshots/{revision}")
    job.json(f"{_CACHE}/snapshots/{revision}/config.json", configs.clip_config(job))
    job.remarks.append("it opens sessions at ORT_ENABLE_BASIC, which has no int8 kernels: 1.6 to 1.9 times slower.")
    job.remarks.append("choose jinav1 and model_size small; HF_HUB_OFFLINE=1 keeps its tokenizer from being replaced.")
    configs.remark_on_cleaning(job, "Frigate")


FRIGATE = Stack(
    "frigate",
    _write,
    "copy model_cache into Frigate's config folder, and index again",
)
