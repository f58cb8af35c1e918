"""transformers.js, in Node and in browsers: split towers for embeddings, both in one file for zero-shot pipelines.

Files are found by a suffix that names their width; without a word of the user Node loads FP32, so `config.json` names
the one that is there. Browsers load the WebGPU build of onnxruntime-web, which has no kernel for INT4: nibbles. Texts
over the context lose their end token in its tokenizer: the guard.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.edits import LooseLayout
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_SUFFIXES = {"fp32": ("fp32", ""), "fp16": ("fp16", "_fp16")}
_QUANTIZED = ("q8", "_quantized")  # its name for whatever is quantised; the default in browsers


def _write(job: Job) -> None:
    needs.square(job)
    needs.no_padding_of_images(job)
    needs.tokenizer_file(job)
    dtype, suffix = _SUFFIXES.get(job.bundle.manifest.bits, _QUANTIZED)
    loose, guard = (LooseLayout(),), job.guard()
    job.encoder("image", f"onnx/vision_model{suffix}.onnx", *loose)
    job.encoder("text", f"onnx/text_model{suffix}.onnx", *loose, *guard)
    if job.bundle.manifest.model.logit_scale is None:
        job.remarks.append("the model has no logit scale: no file of both towers, and no zero-shot pipeline.")
    else:
        job.combined(f"onnx/model{suffix}.onnx", loose, guard)
    needs.one_file(job)
    job.json("config.json", configs.clip_config(job) | {"transformers.js_config": {"dtype": dtype}})
    job.json("preprocessor_config.json", configs.preprocessor_config(job))
    configs.write_texts(job)
    job.remarks.append("its resize is not pillow's: images get only near the right embeddings (docs/serving.md).")
    configs.remark_on_cleaning(job, "transformers.js")


TRANSFORMERSJS = Stack(
    "transformersjs",
    _write,
    "env.localModelPath = the folder above; CLIPVisionModelWithProjection.from_pretrained(its name)",
)
