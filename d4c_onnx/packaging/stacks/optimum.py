"""optimum-onnx: both towers in one file, beside the configs that transformers' pipelines read.

The zero-shot pipeline does not cut texts: the guard.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack


def _write(job: Job) -> None:
    needs.square(job)
    needs.no_padding_of_images(job)
    needs.tokenizer_file(job)
    job.combined("model.onnx", text=job.guard())
    job.json("config.json", configs.clip_config(job))
    job.json("preprocessor_config.json", configs.preprocessor_config(job))
    configs.write_texts(job)
    job.remarks.append("both towers run for every request: for embeddings alone use another target.")
    configs.remark_on_pixels(job, "transformers")
    configs.remark_on_cleaning(job, "transformers")


OPTIMUM = Stack(
    "optimum",
    _write,
    "ORTModelForZeroShotImageClassification.from_pretrained(folder)",
)
