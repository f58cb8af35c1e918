"""Embeds pixels and ids with OpenVINO from a package on disk; prints JSON. Runs in OpenVINO's own environment.

Floats are float32: what bfloat16 takes, where the processor has it, would hide a weight that is unpacked wrongly.
"""

import json
import sys
from pathlib import Path

import numpy as np
import openvino

folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
core = openvino.Core()


def answers(tower: str, feeds: list[np.ndarray]) -> list[list[float]]:
    """What the served file gives, one request after the other."""
    file = core.read_model(folder / "model_repository" / tower / "1" / "model.onnx")
    model = core.compile_model(file, "CPU", {"INFERENCE_PRECISION_HINT": "f32"})
    return [model(feed)[model.output(0)][0].tolist() for feed in feeds]


pixels = np.array(request["pixels"], np.float32).reshape(request["shape"])
found = {
    "image_embeds": answers("image_encoder", [one[None] for one in pixels]),
    "text_embeds": answers("text_encoder", [np.array([ids], np.int64) for ids in request["input_ids"]]),
}
print(json.dumps(found))
