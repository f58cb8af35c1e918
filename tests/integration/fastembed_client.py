"""Embeds images and texts with fastembed from a package on disk; prints JSON. Runs in fastembed's own environment."""

import json
import sys
from pathlib import Path

import numpy as np
from fastembed import ImageEmbedding, TextEmbedding

folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))
image = ImageEmbedding("Qdrant/clip-ViT-B-32-vision", specific_model_path=str(folder / "image"))
text = TextEmbedding("Qdrant/clip-ViT-B-32-text", specific_model_path=str(folder / "text"))
found = {
    "own_resize": np.stack(list(image.embed(request["images"]))).tolist(),
    "text_embeds": np.stack(list(text.embed(request["texts"]))).tolist(),
}
print(json.dumps(found))
