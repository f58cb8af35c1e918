"""Parses a package's configs with Triton's own message types; prints JSON. Runs in tritonclient's environment."""

import json
import sys
from pathlib import Path

from google.protobuf import text_format
from tritonclient.grpc import model_config_pb2

found = {}
for path in sorted(Path(sys.argv[1]).glob("model_repository/*/config.pbtxt")):
    config = text_format.Parse(path.read_text("utf-8"), model_config_pb2.ModelConfig())
    found[path.parent.name] = {
        "name": config.name,
        "backend": config.backend or config.platform,
        "inputs": [[entry.name, list(entry.dims)] for entry in config.input],
        "outputs": [[entry.name, list(entry.dims)] for entry in config.output],
        "steps": [step.model_name for step in config.ensemble_scheduling.step],
    }
print(json.dumps(found))
