"""Stores and searches images and texts with qdrant-client, fastembed inside, in memory; prints JSON."""

import json
import sys
from pathlib import Path

from qdrant_client import QdrantClient, models

folder, request = Path(sys.argv[1]), json.loads(Path(sys.argv[2]).read_text("utf-8"))


def image(path: str) -> models.Image:
    """An image to be embedded by the client."""
    options = {"specific_model_path": str(folder / "image")}
    return models.Image(image=path, model="Qdrant/clip-ViT-B-32-vision", options=options)


def text(words: str) -> models.Document:
    """A text to be embedded by the client."""
    options = {"specific_model_path": str(folder / "text")}
    return models.Document(text=words, model="Qdrant/clip-ViT-B-32-text", options=options)


client = QdrantClient(":memory:")
stored = {"images": [image(path) for path in request["images"]], "texts": [text(words) for words in request["texts"]]}
vectors = {}
for name, entries in stored.items():
    space = models.VectorParams(size=request["size"], distance=models.Distance.DOT)
    client.create_collection(name, vectors_config=space)
    points = [models.PointStruct(id=number, vector=entry) for number, entry in enumerate(entries)]
    client.upsert(name, points)
    found = client.retrieve(name, list(range(len(points))), with_vectors=True)
    vectors[name] = [point.vector for point in sorted(found, key=lambda point: point.id)]
searched = client.query_points("texts", query=image(request["images"][0]), limit=len(request["texts"])).points
scores = [{"label": request["texts"][point.id], "score": point.score} for point in searched]
print(json.dumps({"own_resize": vectors["images"], "text_embeds": vectors["texts"], "scores": scores}))
