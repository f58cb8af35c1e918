"""OpenVINO's model server, and OpenVINO itself: a folder a model, a folder a version."""

from __future__ import annotations

import onnx_ir as ir

from d4c_onnx.errors import BundleError
from d4c_onnx.graph.model import load_model
from d4c_onnx.graph.values import array, is_op, nodes_of
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_REPOSITORY = "model_repository"
_MOUNTED = "/models"  # where the server's image looks


def _write(job: Job) -> None:
    names = {tower: f"{tower}_encoder" for tower in job.bundle.encoders}
    for path in job.bundle.encoders.values():
        if shifts_bits_out(load_model(path)):
            raise BundleError(
                f"{path}: shifts bits out of bytes, as files of an older d4c-onnx do, and OpenVINO rounds there: its "
                "answers would be others. Quantise again, with --overwrite."
            )
    for tower, name in names.items():
        job.encoder(tower, f"{_REPOSITORY}/{name}/1/model.onnx")
    served = [{"config": {"name": name, "base_path": f"{_MOUNTED}/{name}"}} for name in names.values()]
    job.json(f"{_REPOSITORY}/config.json", {"model_config_list": served})
    job.remarks.append(
        "it computes floats in bfloat16 where the processor has it: the third digit differs; not so with "
        "INFERENCE_PRECISION_HINT=f32."
    )
    job.remarks.append("it takes pixel_values and input_ids: d4c_onnx.runtime makes both, docs/inputs.md says how.")


def shifts_bits_out(model: ir.Model) -> bool:
    """Whether a byte is shifted to the right that has bits to lose: OpenVINO divides, and rounds to nearest."""
    for node in nodes_of(model.graph, "BitShift"):
        value, by = node.inputs[0], array(node.inputs[1])
        masked = value.producer() if value is not None else None
        mask = array(masked.inputs[1]) if masked is not None and is_op(masked, "BitwiseAnd") else None
        if mask is None or by is None or (mask >> by << by != mask).any():
            return True
    return False


OPENVINO = Stack(
    "openvino",
    _write,
    "ovms --config_path /models/config.json with model_repository mounted at /models; or core.read_model(the file)",
)
