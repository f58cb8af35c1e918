"""How many nodes of each operator a file holds, per model, width and target: stored, so that review sees a change.

WRITE_CENSUS=1 pytest -m "" tests/quantization/test_census.py      # after a change that is meant to change the graphs
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest

from d4c_onnx.bundle import Bundle
from d4c_onnx.calibration import CalibrationSet, D4CCalibrationDataReader, PromptCalibrationDataReader
from d4c_onnx.calibration.dataset import open_calibration_set
from d4c_onnx.graph.model import load_model, opset_of
from d4c_onnx.quantization import quantize_encoder
from d4c_onnx.recipe import load_recipe

STORED = Path(__file__).with_name("census.json")
TARGETS = ("cpu", "portable", "tensorrt", "openvino", "cuda")
CASES = [
    pytest.param(
        model,
        bits,
        target,
        marks=[] if target == "cpu" or (model, target) == ("vit", "portable") else pytest.mark.slow,
    )
    for model in ("vit", "rn")
    for target in TARGETS
    for bits in ("w8a8", "w4a8", *(["w4a16"] if target == "cuda" else []))
]


@pytest.mark.parametrize(("model", "bits", "target"), CASES)
def test_operators_of_the_files_are_those_that_were_reviewed(
    model: str, bits: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle: Bundle = request.getfixturevalue(f"{model}_bundle")
    given = request.getfixturevalue(f"{model}_calibration")
    dataset: CalibrationSet = given[1] if model == "vit" else open_calibration_set(given)
    keys = [f"bits={bits}", f"target={target}", "rounding=nearest", "smoothing=none"]
    section = load_recipe(None, [f"quantization.{key}" for key in keys]).quantization
    readers = {"image": D4CCalibrationDataReader(dataset), "text": PromptCalibrationDataReader(dataset)}
    found = {}
    for tower, path in bundle.encoders.items():
        quantize_encoder(path, tmp_path / "q.onnx", readers[tower], section, threads=1)
        made = load_model(tmp_path / "q.onnx")
        operators = Counter(f"{node.domain}:{node.op_type}".removeprefix(":") for node in made.graph)
        found[tower] = {"opset": opset_of(made), **dict(sorted(operators.items()))}
    stored = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {}
    name = f"{bundle.model_name} {bits} {target}"
    if os.environ.get("WRITE_CENSUS"):
        STORED.write_text(json.dumps(dict(sorted({**stored, name: found}.items())), indent=1) + "\n", "utf-8")
    else:
        assert found == stored[name]
