"""A page that runs both encoders in the browser: pictures and labels never leave it.

onnxruntime-web and a tokenizer come from npm into the folder; a server of files is all that is needed. 4-bit weights
lie as nibbles, which any build of onnxruntime-web reads; the tokenizer does not cut texts: the guard.
"""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.edits import LooseLayout
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack
from d4c_onnx.runtime.preprocess import filter_of
from d4c_onnx.web_page import BROWSER, page_of

_LIBRARIES = {"@huggingface/tokenizers": "0.2.0", "onnxruntime-web": "1.30.0"}


def _write(job: Job) -> None:
    needs.tokenizer_file(job)
    if filter_of(job.preprocess) == "nearest":
        raise job.refusal("knows no filter `nearest`, which this model's pixels want")
    job.encoder("image", "image_encoder.onnx", LooseLayout())
    job.encoder("text", "text_encoder.onnx", LooseLayout(), *job.guard())
    needs.one_file(job)
    configs.write_texts(job)
    job.json(configs.WEB_CONFIG, _web_config(job))
    job.json("package.json", {"private": True, "dependencies": _LIBRARIES})
    job.text("index.html", page_of(BROWSER))
    configs.remark_on_cleaning(job, "the page")
    job.remarks.append("browsers turn pictures upright and mix in what is transparent, which open_clip does not.")


def _web_config(job: Job) -> dict[str, object]:
    """What the page has to know."""
    model = job.bundle.manifest.model
    return {
        "model": model.name,
        "bundle": job.bundle.manifest.bits,
        "logit_scale": model.scale,
        "logit_bias": model.logit_bias,
        "preprocess": configs.open_clip_pixels(job),
    }


WEB = Stack(
    "web",
    _write,
    "npm install --ignore-scripts in the folder, then any server of files, such as python -m http.server -b 127.0.0.1",
)
