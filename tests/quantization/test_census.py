"""How many nodes of each operator a file holds, per model, width and target: stored, so that review sees a change.

WRITE_CENSUS=1 pytest -m "" tests/quantization/test_census.py      # after a change that is meant to change the graphs
"""

import json
import os
from collections import Counter
from pathlib import Path

import pytest
from encoders import material, quantize

from d4c_onnx.choices import TARGETS
from d4c_onnx.graph.model import opset_of

STORED = Path(__file__).with_name("census.json")
CASES = [
    (model, bits, target)
    for model in ("vit", "rn")
    for target in TARGETS
    for bits in ("w8a8", "w4a8", *(["w4a16"] if target == "cuda" else []))
]


@pytest.mark.slow
@pytest.mark.parametrize(("model", "bits", "target"), CASES)
def test_operators_of_the_files_are_those_that_were_reviewed(
    model: str, bits: str, target: str, tmp_path: Path, request: pytest.FixtureRequest
) -> None:
    bundle, dataset = material(request, model)
    keys = (f"bits={bits}", f"target={target}", "rounding=nearest", "smoothing=none")
    found = {}
    for tower, path in bundle.encoders.items():
        _, made = quantize(path, dataset, tmp_path / "q.onnx", *keys)
        operators = Counter(f"{node.domain}:{node.op_type}".removeprefix(":") for node in made.graph)
        found[tower] = {"opset": opset_of(made), **dict(sorted(operators.items()))}
    stored = json.loads(STORED.read_text("utf-8")) if STORED.exists() else {}
    name = f"{bundle.model_name} {bits} {target}"
    if os.environ.get("WRITE_CENSUS"):
        STORED.write_text(json.dumps(dict(sorted({**stored, name: found}.items())), indent=1) + "\n", "utf-8")
    else:
        assert found == stored[name]
