"""Embeds and classifies with optimum-onnx from a package on disk; prints JSON. Runs in its own environment."""

import json
import sys
from pathlib import Path

import torch
from optimum.onnxruntime import ORTModelForZeroShotImageClassification
from PIL import Image
from transformers import AutoImageProcessor, AutoTokenizer, pipeline

folder, request = sys.argv[1], json.loads(Path(sys.argv[2]).read_text("utf-8"))
model = ORTModelForZeroShotImageClassification.from_pretrained(folder)
tokenizer, processor = AutoTokenizer.from_pretrained(folder), AutoImageProcessor.from_pretrained(folder)
words = tokenizer(request["texts"], padding=True, return_tensors="pt")
pixels = torch.tensor(request["pixels"]).reshape(request["shape"])
images = [Image.open(path) for path in request["images"]]
given = model(**words, pixel_values=pixels)
own = model(**words, pixel_values=processor(images, return_tensors="pt")["pixel_values"])
classify = pipeline("zero-shot-image-classification", model=model, tokenizer=tokenizer, image_processor=processor)
found = {
    "text_embeds": given.text_embeds.tolist(),
    "image_embeds": given.image_embeds.tolist(),
    "own_resize": own.image_embeds.tolist(),
    "scores": classify(request["images"][0], candidate_labels=request["texts"], hypothesis_template="{}"),
}
print(json.dumps(found))
