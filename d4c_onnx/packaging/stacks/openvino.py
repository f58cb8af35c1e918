"""OpenVINO's model server, and OpenVINO itself: a folder a model, a folder a version."""

from __future__ import annotations

from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_REPOSITORY = "model_repository"
_MOUNTED = "/models"  # where the server's image looks


def _write(job: Job) -> None:
    names = {tower: f"{tower}_encoder" for tower in job.bundle.encoders}
    for tower, name in names.items():
        job.encoder(tower, f"{_REPOSITORY}/{name}/1/model.onnx")
    served = [{"config": {"name": name, "base_path": f"{_MOUNTED}/{name}"}} for name in names.values()]
    job.json(f"{_REPOSITORY}/config.json", {"model_config_list": served})
    job.remarks.append(
        "it computes floats in bfloat16 where the processor has it: the third digit differs; not so with "
        "INFERENCE_PRECISION_HINT=f32."
    )
    job.remarks.append("it takes pixel_values and input_ids: d4c_onnx.runtime makes both, docs/inputs.md says how.")


OPENVINO = Stack(
    "openvino",
    _write,
    "ovms --config_path /models/config.json with model_repository mounted at /models; or core.read_model(the file)",
)
