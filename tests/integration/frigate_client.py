"""Loads a package with the libraries' calls that Frigate's jina v1 search makes; prints JSON. Not Frigate itself.

Runs in optimum's environment, whose transformers is a 4, as Frigate's is: a tokenizer from a cache by its repository's
name, offline; a feature extractor from the folder; sessions with basic optimisations, fed by the names of their inputs.
"""

import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
from PIL import Image
from transformers import AutoFeatureExtractor, AutoTokenizer

MODEL = "jinaai/jina-clip-v1"
request = json.loads(Path(sys.argv[2]).read_text("utf-8"))
folder = Path(sys.argv[1], "model_cache", MODEL)
tokenizer = AutoTokenizer.from_pretrained(MODEL, cache_dir=folder / "tokenizer", clean_up_tokenization_spaces=True)
pixels = AutoFeatureExtractor.from_pretrained(folder)
options = ort.SessionOptions()
options.graph_optimization_level = ort.GraphOptimizationLevel.ORT_ENABLE_BASIC


def embeddings(file: str, rows: list[Any]) -> list[list[float]]:
    """The first output for rows that the libraries have prepared one by one."""
    session = ort.InferenceSession(folder / file, options, providers=["CPUExecutionProvider"])
    names = [entry.name for entry in session.get_inputs()]
    return session.run(None, {name: np.concatenate([row[name] for row in rows]) for name in names})[0].tolist()


longest = max(len(tokenizer.encode(text)) for text in request["texts"])
cut = {"padding": "max_length", "truncation": True, "max_length": longest, "return_tensors": "np"}
images = [Image.open(image).convert("RGB") for image in request["images"]]
found = {
    "own_resize": embeddings("vision_model_quantized.onnx", [pixels(image, return_tensors="np") for image in images]),
    "text_embeds": embeddings("text_model_fp16.onnx", [tokenizer(text, **cut) for text in request["texts"]]),
}
print(json.dumps(found))
