"""LibrePhotos: a folder under the name of the one CLIP that it runs, ViT-B/32 at 224 pixels."""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_FOLDER, _SIDE, _DIMENSIONS, _CONTEXT = "clip_vit_b32", 224, 512, 77


def _write(job: Job) -> None:
    needs.size(job, _SIDE)
    needs.dimensions(job, _DIMENSIONS)
    needs.pixels_of_clip(job)
    needs.tokenizer_file(job)
    needs.longest_text(job, _CONTEXT)
    job.encoder("image", f"{_FOLDER}/vision_model.onnx")
    job.encoder("text", f"{_FOLDER}/text_model.onnx", *job.fill())
    job.copy(job.bundle.tokenizer, f"{_FOLDER}/tokenizer.json")
    configs.remark_on_cleaning(job, "LibrePhotos")
    job.remarks.append("embeddings of two models do not compare: let it look at all photographs again.")


LIBREPHOTOS = Stack(
    "librephotos",
    _write,
    "copy clip_vit_b32 over the folder of that name in its data_models",
)
