"""fastembed and Qdrant's client: one flat folder a tower. txtai reads the text folder, too.

The first output is taken, silently, and texts are cut with their end token and padded to the batch's longest.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack


def _write(job: Job) -> None:
    needs.tokenizer_file(job)
    needs.no_padding_of_images(job)
    if job.preprocess.resize_mode == "shortest":
        needs.square(job)  # it resizes the shorter side to one length, then crops
    job.encoder("image", "image/model.onnx")
    job.json("image/preprocessor_config.json", configs.preprocessor_config(job))
    job.encoder("text", "text/model.onnx", *job.fill())
    configs.write_texts(job, "text")
    job.json("text/config.json", configs.clip_config(job))
    job.remarks.append("it rounds the crop down where open_clip rounds: an image may be seen one pixel further.")
    job.remarks.append("images have no models of one's own there: load them as Qdrant/clip-ViT-B-32-vision.")
    configs.remark_on_cleaning(job, "fastembed")


FASTEMBED = Stack(
    "fastembed",
    _write,
    'ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=".../image"), '
    'TextEmbedding("Qdrant/clip-ViT-B-32-text", specific_model_path=".../text")',
)
