// The engine of `d4c-onnx package --target web`: both encoders run here, by onnxruntime-web; files are beside the page,
// libraries in node_modules/. Another package beside this one is compared with it: ?beside=../its-folder/
import * as ort from "./node_modules/onnxruntime-web/dist/ort.wasm.min.mjs";
import { Tokenizer } from "./node_modules/@huggingface/tokenizers/dist/tokenizers.min.mjs";

let models;

async function describe() {
  const beside = new URLSearchParams(location.search).get("beside");
  const folders = [new URL("./", location.href)];
  if (beside) folders.push(new URL(beside.replace(/\/*$/, "/"), location.href));
  if (folders.some((folder) => folder.origin !== location.origin)) throw new Error("beside: names a folder of this server.");
  models = await Promise.all(folders.map(load));
  return { model: models[0].config.model, bundles: models.map(({ config }) => config.bundle) };
}

async function zeroShot(pictures, labels, template) {
  const results = [];
  for (const model of models) results.push(await scored(model, pictures, labels, template));
  return { labels, results };
}

async function load(folder) {
  const bytes = async (name) => {
    const response = await fetch(new URL(name, folder));
    if (!response.ok) throw new Error(`${name}: the server answers ${response.status}`);
    return response;
  };
  const json = async (name) => (await bytes(name)).json();
  const session = async (name) =>
    ort.InferenceSession.create(await (await bytes(name)).arrayBuffer(), { executionProviders: ["wasm"] });
  const [config, tokens, settings] = await Promise.all(["web.json", "tokenizer.json", "tokenizer_config.json"].map(json));
  const model = {
    config,
    tokenizer: new Tokenizer(tokens, settings),
    image: await session("image_encoder.onnx"), // one after the other: both would need the memory of loading at once
    text: await session("text_encoder.onnx"),
  };
  const gray = new OffscreenCanvas(8, 8);
  gray.getContext("2d").fillRect(0, 0, 8, 8);
  await scored(model, [await gray.convertToBlob()], ["a"], "{}"); // the first run takes longer than any other
  return model;
}

async function scored({ config, tokenizer, image, text }, pictures, labels, template) {
  const pixels = await Promise.all(pictures.map((picture) => pixelValues(picture, config.preprocess)));
  const ids = labels.map((label) => tokenizer.encode(template.replaceAll("{}", label)).ids);
  const begun = performance.now();
  const seen = [];
  for (const one of pixels) {
    const feed = new ort.Tensor("float32", one, [1, 3, ...config.preprocess.size]);
    seen.push(unit((await image.run({ pixel_values: feed })).image_embeds.data));
  }
  const between = performance.now();
  const read = [];
  for (const row of ids) {
    const feed = new ort.Tensor("int64", BigInt64Array.from(row, BigInt), [1, row.length]);
    read.push(unit((await text.run({ input_ids: feed })).text_embeds.data));
  }
  const ended = performance.now();
  return {
    bundle: config.bundle,
    scores: seen.map((one) => probabilities(read.map((other) => dot(one, other)), config)),
    image_milliseconds: between - begun,
    text_milliseconds: ended - between,
  };
}

function dot(one, other) {
  return one.reduce((sum, value, index) => sum + value * other[index], 0);
}

function unit(vector) {
  const length = Math.max(Math.sqrt(dot(vector, vector)), 1e-12);
  return Array.from(vector, (value) => value / length);
}

function probabilities(cosines, { logit_scale, logit_bias }) {
  const logits = cosines.map((cosine) => logit_scale * cosine);
  if (logit_bias !== null) return logits.map((logit) => 1 / (1 + Math.exp(-logit - logit_bias)));
  const most = Math.max(...logits);
  const weights = logits.map((logit) => Math.exp(logit - most));
  const sum = weights.reduce((total, weight) => total + weight, 0);
  return weights.map((weight) => weight / sum);
}

// pixel_values float32 [3, H, W], resized as pillow resizes, which no browser's own resize does.
async function pixelValues(picture, { size: [height, width], mean, std, resize_mode, interpolation, fill_color }) {
  const source = await decoded(picture);
  const filter = FILTERS[interpolation];
  let [wide, high] = [width, height];
  if (resize_mode !== "squash") {
    const ratios = [source.height / height, source.width / width];
    const ratio = resize_mode === "longest" ? Math.max(...ratios) : Math.min(...ratios);
    const short = Math.min(source.width, source.height);
    const torchvisions = resize_mode === "shortest" && height === width; // its rule: the long side is rounded down
    const fitted = (side) => (torchvisions ? Math.floor((height * side) / short) : Math.max(even(side / ratio), 1));
    [wide, high] = [fitted(source.width), fitted(source.height)];
  }
  if (wide * high > 2 ** 26) throw new Error(`${picture.name}: is too long a strip.`);
  const [left, top] = [wide - width, high - height].map((room) => (resize_mode === "longest" ? Math.ceil(room / 2) : even(room / 2)));
  const resized = resize(source, wide, high, filter);
  const values = new Float32Array(3 * height * width);
  for (let y = 0; y < height; y++) {
    for (let x = 0; x < width; x++) {
      const [u, v] = [x + left, y + top];
      const inside = u >= 0 && v >= 0 && u < wide && v < high;
      for (let channel = 0; channel < 3; channel++) {
        const value = inside ? resized[3 * (v * wide + u) + channel] : fill_color;
        values[(channel * height + y) * width + x] = (value / 255 - mean[channel]) / std[channel];
      }
    }
  }
  return values;
}

function even(value) { // Python's round
  const floor = Math.floor(value);
  return value - floor === 0.5 ? floor + (floor % 2 === 0 ? 0 : 1) : Math.round(value);
}

async function decoded(picture) {
  const bitmap = await createImageBitmap(picture, { colorSpaceConversion: "none", premultiplyAlpha: "none" }).catch(() => {
    throw new Error(`${picture.name}: is no picture that this browser can read.`);
  });
  const { width, height } = bitmap;
  const context = new OffscreenCanvas(width, height).getContext("2d");
  context.drawImage(bitmap, 0, 0);
  bitmap.close();
  const { data } = context.getImageData(0, 0, width, height);
  const rgb = new Uint8ClampedArray(3 * width * height);
  for (let index = 0; index < width * height; index++) rgb.set(data.subarray(4 * index, 4 * index + 3), 3 * index);
  return { width, height, rgb };
}

const cubic = (x) => (x < 1 ? (1.5 * x - 2.5) * x * x + 1 : x < 2 ? ((-0.5 * x + 2.5) * x - 4) * x + 2 : 0);
const sinc = (x) => (x === 0 ? 1 : Math.sin(Math.PI * x) / (Math.PI * x));
const FILTERS = { // [support, weight at a distance]
  box: [0.5, (x) => (x <= 0.5 ? 1 : 0)],
  bilinear: [1, (x) => Math.max(1 - x, 0)],
  hamming: [1, (x) => (x >= 1 ? 0 : sinc(x) * (0.54 + 0.46 * Math.cos(Math.PI * x)))],
  bicubic: [2, cubic],
  lanczos: [3, (x) => (x < 3 ? sinc(x) * sinc(x / 3) : 0)],
};

// Pillow's resize of 8-bit RGB: rows first, then columns, rounded to 8 bits after each.
function resize({ width, height, rgb }, wide, high, filter) {
  const flat = width === wide ? rgb : pass(rgb, width, wide, height, 3, 3 * width, 3, 3 * wide, filter);
  return height === high ? flat : pass(flat, height, high, wide, 3 * wide, 3, 3 * wide, 3, filter);
}

function pass(source, from, to, lines, step, line, newStep, newLine, [support, weightAt]) {
  const target = new Uint8ClampedArray(3 * to * lines); // rounds by itself
  const scale = from / to;
  const stretch = Math.max(scale, 1);
  for (let place = 0; place < to; place++) {
    const center = (place + 0.5) * scale;
    const first = Math.max(Math.trunc(center - support * stretch + 0.5), 0);
    const last = Math.min(Math.trunc(center + support * stretch + 0.5), from);
    const weights = [];
    for (let index = first; index < last; index++) weights.push(weightAt(Math.abs((index - center + 0.5) / stretch)));
    const sum = weights.reduce((total, weight) => total + weight, 0);
    for (let row = 0; row < lines; row++) {
      for (let channel = 0; channel < 3; channel++) {
        let value = 0;
        for (let index = 0; index < weights.length; index++) {
          value += weights[index] * source[row * line + (first + index) * step + channel];
        }
        target[row * newLine + place * newStep + channel] = value / sum;
      }
    }
  }
  return target;
}
