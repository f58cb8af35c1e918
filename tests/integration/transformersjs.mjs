// Embeds golden images and texts with transformers.js from a package on disk; prints JSON.
import { readFileSync } from "node:fs";
import path from "node:path";
import { createRequire } from "node:module";

const [modules, folder, request] = process.argv.slice(2);
const { env, AutoTokenizer, AutoProcessor, CLIPTextModelWithProjection, CLIPVisionModelWithProjection, RawImage, pipeline, Tensor } =
  await import(createRequire(path.join(modules, "index.js")).resolve("@huggingface/transformers"));
env.allowRemoteModels = false;
env.localModelPath = path.dirname(folder);
const name = path.basename(folder);
const { image, texts, pixels, shape } = JSON.parse(readFileSync(request, "utf-8"));

const tokenizer = await AutoTokenizer.from_pretrained(name);
const text_model = await CLIPTextModelWithProjection.from_pretrained(name);
const vision_model = await CLIPVisionModelWithProjection.from_pretrained(name);
const ids = tokenizer(texts, { padding: true, truncation: true });
const { text_embeds } = await text_model(ids);
const given = new Tensor("float32", Float32Array.from(pixels), shape);
const right = await vision_model({ pixel_values: given });
const processor = await AutoProcessor.from_pretrained(name);
const own = await vision_model(await processor(await RawImage.read(image)));
const classify = await pipeline("zero-shot-image-classification", name);
const scores = await classify(image, texts);
console.log(JSON.stringify({
  text_embeds: text_embeds.tolist(),
  image_embeds: right.image_embeds.tolist()[0],
  own_resize: own.image_embeds.tolist()[0],
  scores,
}));
