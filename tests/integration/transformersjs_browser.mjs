// Embeds images and texts with transformers.js in headless Chromium from a package on disk; prints JSON.
import { existsSync, readFileSync } from "node:fs";
import path from "node:path";
import { inBrowser } from "./browser.mjs";

const [modules, folder, request] = process.argv.slice(2);
const asked = JSON.parse(readFileSync(request, "utf-8"));
const nested = "@huggingface/transformers/node_modules/onnxruntime-web";
const web = existsSync(path.join(modules, "node_modules", nested)) ? nested : "onnxruntime-web";
const imports = {
  "@huggingface/transformers": "/modules/@huggingface/transformers/dist/transformers.web.js",
  "onnxruntime-web/webgpu": `/modules/${web}/dist/ort.webgpu.min.mjs`,
  "onnxruntime-web": `/modules/${web}/dist/ort.webgpu.min.mjs`,
  "onnxruntime-common": "/modules/onnxruntime-common/dist/esm/index.js",
};
const roots = { served: path.dirname(folder), images: path.dirname(asked.images[0]) };
const inside = async ({ asked, name, images, wasm }) => {
  const library = await import("@huggingface/transformers");
  const { embed } = await import("/here/embed_transformersjs.mjs");
  library.env.allowRemoteModels = false;
  library.env.allowLocalModels = true;
  library.env.localModelPath = "/served/";
  library.env.backends.onnx.wasm.wasmPaths = wasm;
  library.env.backends.onnx.wasm.numThreads = 1;
  return embed(library, asked, images, name);
};
const images = asked.images.map((file) => `/images/${path.basename(file)}`);
const found = await inBrowser(modules, imports, roots, inside, {
  asked,
  name: path.basename(folder),
  images,
  wasm: `/modules/${web}/dist/`,
});
console.log(JSON.stringify(found));
