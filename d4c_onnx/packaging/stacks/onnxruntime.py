"""onnxruntime alone: the files as they are, and an example in Python and one in JavaScript that need no d4c-onnx."""

from __future__ import annotations

from d4c_onnx.packaging import configs, needs
from d4c_onnx.packaging.job import Job
from d4c_onnx.packaging.stack import Stack
from d4c_onnx.runtime.preprocess import FILTERS, filter_of

_PYTHON = '''"""Embed an image and texts. Needs: pip install onnxruntime tokenizers pillow numpy"""

import sys
from pathlib import Path

import numpy as np
import onnxruntime as ort
from PIL import Image
from tokenizers import Tokenizer

here = Path(__file__).parent
SIZE, FILTER = ({width}, {height}), Image.Resampling({resample})
MEAN, STD = np.float32({mean}), np.float32({std})
image_encoder = ort.InferenceSession(here / "image_encoder.onnx")
text_encoder = ort.InferenceSession(here / "text_encoder.onnx")
tokenizer = Tokenizer.from_file(str(here / "tokenizer.json"))  # cuts and pads by itself


def embed_image(path: str) -> np.ndarray:
    image = Image.open(path)
{fit}
    pixels = (np.asarray(image.convert("RGB"), np.float32) / 255 - MEAN) / STD
    return image_encoder.run(None, {{"pixel_values": pixels.transpose(2, 0, 1)[None]}})[0]


def embed_texts(texts: list[str]) -> np.ndarray:
    ids = np.array([row.ids for row in tokenizer.encode_batch(texts)], np.int64)
    return text_encoder.run(None, {{"input_ids": ids}})[0]


print(embed_image(sys.argv[1]) @ embed_texts(sys.argv[2:]).T)
'''

# As runtime.preprocess does it: the image becomes RGB after it was resized, where its mode can be.
_CROP = """
    left, top = round((width - SIZE[0]) / 2), round((height - SIZE[1]) / 2)
    image = image.resize((width, height), FILTER).crop((left, top, left + SIZE[0], top + SIZE[1]))"""
_SQUARE = f"    width, height = (int(SIZE[0] * side / min(image.size)) for side in image.size){_CROP}"
_OBLONG = f"""    ratio = min(image.height / SIZE[1], image.width / SIZE[0])
    width, height = (round(side / ratio) for side in image.size){_CROP}"""
_SQUASH = "    image = image.resize(SIZE, FILTER)"
_PAD = """    image = image.convert("RGB") if image.mode in ("P", "CMYK") else image
    ratio = max(image.height / SIZE[1], image.width / SIZE[0])
    width, height = (max(round(side / ratio), 1) for side in image.size)
    small, image = image.resize((width, height), FILTER), Image.new("RGB", SIZE, ({fill}, {fill}, {fill}))
    image.paste(small.convert("RGB"), ((SIZE[0] - width) // 2, (SIZE[1] - height) // 2))"""

_JAVASCRIPT = """// Embed an image and texts. Needs: npm i onnxruntime-node @huggingface/transformers
import path from "node:path";
import { fileURLToPath } from "node:url";
import ort from "onnxruntime-node";
import { AutoProcessor, AutoTokenizer, RawImage, env } from "@huggingface/transformers";

const here = path.dirname(fileURLToPath(import.meta.url));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(here);
const name = path.basename(here);
const image_encoder = await ort.InferenceSession.create(path.join(here, "image_encoder.onnx"));
const text_encoder = await ort.InferenceSession.create(path.join(here, "text_encoder.onnx"));
const processor = await AutoProcessor.from_pretrained(name); // its resize is not pillow's
const tokenizer = await AutoTokenizer.from_pretrained(name);

async function embed_image(file) {
  const { pixel_values } = await processor(await RawImage.read(file));
  const feed = new ort.Tensor("float32", pixel_values.data, pixel_values.dims);
  return (await image_encoder.run({ pixel_values: feed })).image_embeds.data;
}

async function embed_text(text) {
  const { input_ids } = tokenizer([text]);
  const feed = new ort.Tensor("int64", input_ids.data, input_ids.dims);
  return (await text_encoder.run({ input_ids: feed })).text_embeds.data;
}

const [image, ...texts] = process.argv.slice(2);
const seen = await embed_image(image);
for (const text of texts) {
  const read = await embed_text(text);
  console.log(seen.reduce((sum, value, index) => sum + value * read[index], 0).toFixed(4), text);
}
"""


def _write(job: Job) -> None:
    needs.tokenizer_file(job)
    job.encoder("image", "image_encoder.onnx")
    job.encoder("text", "text_encoder.onnx", *job.guard())
    configs.write_texts(job)
    config = job.preprocess
    height, width = config.size
    fits = {"shortest": _SQUARE if height == width else _OBLONG, "squash": _SQUASH, "longest": _PAD}
    filled = {
        "width": width,
        "height": height,
        "resample": int(FILTERS[filter_of(config)]),
        "mean": list(config.mean),
        "std": list(config.std),
        "fit": fits[config.resize_mode].format(fill=config.fill_color),
    }
    job.text("example.py", _PYTHON.format(**filled))
    configs.remark_on_cleaning(job, "the example")
    if config.resize_mode != "squash" and fits[config.resize_mode] is not _SQUARE:
        job.remarks.append("no example in JavaScript: its image processor makes squares, or squashes, and no more.")
        return
    job.json("config.json", configs.clip_config(job))
    job.json("preprocessor_config.json", configs.preprocessor_config(job))
    job.text("example.mjs", _JAVASCRIPT)
    job.remarks.append("in JavaScript images are resized otherwise than by pillow.")


ONNXRUNTIME = Stack("onnxruntime", _write, "python example.py IMAGE TEXT...")
