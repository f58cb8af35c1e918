"""Embeds texts with txtai from a package on disk; prints JSON. Runs in txtai's own environment."""

import json
import sys
from pathlib import Path

from txtai import Embeddings

folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
embeddings = Embeddings(path=str(folder / "text" / "model.onnx"))
embeddings.index(request["texts"])
scores = [
    {"label": request["texts"][number], "score": score} for number, score in embeddings.search(request["texts"][0])
]
found = [vector.tolist() for vector in embeddings.batchtransform(request["texts"])]
print(json.dumps({"text_embeds": found, "searched": scores}))
