"""NVIDIA's Triton: encoders, and ensembles that take image bytes and strings.

Preparing is done by Python models that call d4c_onnx.runtime, so that pixels and ids are those that the model was
trained with. An ensemble is a model without a file: its version folder is empty.
"""

from __future__ import annotations

from d4c_onnx.manifest_file import MANIFEST
from d4c_onnx.packaging import needs
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_REPOSITORY = "model_repository"
_BATCH = 64  # the largest that is put together

_ENCODER = """name: "{name}"
backend: "onnxruntime"
default_model_filename: "model.onnx"
max_batch_size: {batch}
input [ {{ name: "{input}" data_type: {type} dims: [ {dims} ] }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {size} ] }} ]
dynamic_batching {{ max_queue_delay_microseconds: 1000 }}
instance_group [ {{ kind: KIND_CPU }} ]
"""

_PYTHON = """name: "{name}"
backend: "python"
max_batch_size: {batch}
input [ {{ name: "{input}" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "{output}" data_type: {type} dims: [ {dims} ] }} ]
instance_group [ {{ kind: KIND_CPU }} ]
"""

_ENSEMBLE = """name: "{name}"
platform: "ensemble"
max_batch_size: {batch}
input [ {{ name: "{given}" data_type: TYPE_STRING dims: [ 1 ] }} ]
output [ {{ name: "{output}" data_type: TYPE_FP32 dims: [ {size} ] }} ]
ensemble_scheduling {{
  step [
    {{
      model_name: "{prepare}"
      model_version: -1
      input_map {{ key: "{given}" value: "{given}" }}
      output_map {{ key: "{input}" value: "{input}" }}
    }},
    {{
      model_name: "{encoder}"
      model_version: -1
      input_map {{ key: "{input}" value: "{input}" }}
      output_map {{ key: "{output}" value: "{output}" }}
    }}
  ]
}}
"""

_PIXELS_MODEL = '''"""Image bytes -> pixel_values; needs d4c-onnx in this environment."""

from pathlib import Path

import numpy as np
import triton_python_backend_utils as pb

from d4c_onnx.manifest_file import read_manifest
from d4c_onnx.runtime.images import read_image
from d4c_onnx.runtime.preprocess import preprocess_image


class TritonPythonModel:
    def initialize(self, args):
        self.config = read_manifest(Path(__file__).parent).preprocess

    def execute(self, requests):
        return [self._answer(pb.get_input_tensor_by_name(entry, "image").as_numpy()) for entry in requests]

    def _answer(self, images):
        try:
            pixels = [preprocess_image(read_image(bytes(data)), self.config) for data in images.ravel()]
        except Exception as error:  # whatever comes of any bytes: the request's fault, not the server's
            wrong = f"the image cannot be read: {str(error)[:200]}"
            return pb.InferenceResponse(error=pb.TritonError(wrong, pb.TritonError.INVALID_ARG))
        return pb.InferenceResponse([pb.Tensor("pixel_values", np.stack(pixels))])
'''

_IDS_MODEL = '''"""Texts -> input_ids; needs d4c-onnx in this environment."""

from pathlib import Path

import triton_python_backend_utils as pb

from d4c_onnx.runtime.tokenizer import TextTokenizer


class TritonPythonModel:
    def initialize(self, args):
        self.tokenize = TextTokenizer(Path(__file__).parent / "tokenizer.json")

    def execute(self, requests):
        return [self._answer(pb.get_input_tensor_by_name(entry, "text").as_numpy()) for entry in requests]

    def _answer(self, texts):
        try:
            ids = self.tokenize([text.decode("utf-8") for text in texts.ravel()])
        except UnicodeDecodeError as error:
            return pb.InferenceResponse(error=pb.TritonError(f"not UTF-8: {error}", pb.TritonError.INVALID_ARG))
        return pb.InferenceResponse([pb.Tensor("input_ids", ids)])
'''


def _write(job: Job) -> None:
    needs.tokenizer_file(job, alone=False)
    height, width = job.preprocess.size
    length = -1 if job.tokenizer.dynamic_sequence else job.tokenizer.context_length
    _tower(job, "image", "pixel_values", "TYPE_FP32", f"3, {height}, {width}")
    _tower(job, "text", "input_ids", "TYPE_INT64", str(length))
    for name, content in (("image_pixels", _PIXELS_MODEL), ("text_ids", _IDS_MODEL)):
        job.text(f"{_REPOSITORY}/{name}/1/model.py", content)
        job.copy(job.bundle.path / MANIFEST, f"{_REPOSITORY}/{name}/1/{MANIFEST}")
    job.copy(job.bundle.tokenizer, f"{_REPOSITORY}/text_ids/1/tokenizer.json")
    job.remarks.append("its Python models need d4c-onnx in the environment of Triton's Python backend.")
    job.remarks.append("texts of different lengths are not put into one batch: requests of several texts are faster.")


def _tower(job: Job, tower: str, given: str, kind: str, dims: str) -> None:
    """An encoder, what prepares its input, and the ensemble of both."""
    encoder, ensemble = f"{tower}_encoder", f"embed_{tower}"
    prepare = {"image": "image_pixels", "text": "text_ids"}[tower]
    output = f"{tower}_embeds"
    shared = {"batch": _BATCH, "output": output, "size": job.dimensions, "input": given}
    job.encoder(tower, f"{_REPOSITORY}/{encoder}/1/model.onnx")
    _config(job, encoder, _ENCODER.format(**shared, name=encoder, type=kind, dims=dims))
    python = {"name": prepare, "batch": _BATCH, "input": tower, "output": given, "type": kind, "dims": dims}
    _config(job, prepare, _PYTHON.format(**python))
    _config(job, ensemble, _ENSEMBLE.format(**shared, name=ensemble, given=tower, prepare=prepare, encoder=encoder))
    job.write(f"{_REPOSITORY}/{ensemble}/1", lambda path: path.mkdir())


def _config(job: Job, model: str, content: str) -> None:
    job.text(f"{_REPOSITORY}/{model}/config.pbtxt", content)


TRITON = Stack(
    "triton",
    _write,
    "tritonserver --model-repository=.../model_repository; ask embed_image (image) and embed_text (text)",
)
