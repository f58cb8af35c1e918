"""OpenVINO's model server, and OpenVINO itself: a folder a model, a folder a version."""

from __future__ import annotations

from dataclasses import dataclass

import onnx_ir as ir

from d4c_onnx.errors import BundleError
from d4c_onnx.graph.values import array, is_op, maker, nodes_of
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack

_REPOSITORY = "model_repository"
_MOUNTED = "/models"  # where the server's image looks


def _write(job: Job) -> None:
    names = {tower: f"{tower}_encoder" for tower in job.bundle.encoders}
    rounds = job.refusal(
        "rounds where bits are shifted out of bytes, as files of an older d4c-onnx do, and would give other answers: "
        "quantise again, with --overwrite"
    )
    for tower, name in names.items():
        job.encoder(tower, f"{_REPOSITORY}/{name}/1/model.onnx", LoseNoBits(rounds))
    served = [{"config": {"name": name, "base_path": f"{_MOUNTED}/{name}"}} for name in names.values()]
    job.json(f"{_REPOSITORY}/config.json", {"model_config_list": served})
    job.remarks.append(
        "it computes floats in bfloat16 where the processor has it: the third digit differs; not so with "
        "INFERENCE_PRECISION_HINT=f32."
    )
    job.remarks.append("it takes pixel_values and input_ids: d4c_onnx.runtime makes both, docs/inputs.md says how.")


@dataclass(frozen=True, slots=True)
class LoseNoBits:
    """Nothing changes; a file that shifts bits out is refused."""

    refusal: BundleError
    words: str = "seen to shift no bits out of bytes"

    def apply(self, model: ir.Model) -> None:
        if shifts_bits_out(model):
            raise self.refusal


def shifts_bits_out(model: ir.Model) -> bool:
    """Whether a byte is shifted to the right that has bits to lose: OpenVINO divides, and rounds to nearest."""
    for node in nodes_of(model.graph, "BitShift"):
        masked, by = maker(node.inputs[0]), array(node.inputs[1])
        mask = array(masked.inputs[1]) if masked is not None and is_op(masked, "BitwiseAnd") else None
        if mask is None or by is None or (mask >> by << by != mask).any():
            return True
    return False


OPENVINO = Stack(
    "openvino",
    _write,
    "ovms --config_path /models/config.json with model_repository mounted at /models; or core.read_model(the file)",
)
