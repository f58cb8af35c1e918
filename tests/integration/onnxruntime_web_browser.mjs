// Which builds of onnxruntime-web load a package's files in headless Chromium, and what they answer; prints JSON.
import { readFileSync } from "node:fs";
import { inBrowser } from "./browser.mjs";

const BUILDS = ["ort.wasm.min.mjs", "ort.min.mjs", "ort.all.min.mjs", "ort.webgpu.min.mjs", "ort.jspi.min.mjs"];
const [modules, folder, request] = process.argv.slice(2);
const imports = { "onnxruntime-web/": "/modules/onnxruntime-web/dist/" };
const inside = async ({ builds, asked }) => {
  const { embed } = await import("/here/embed_onnxruntime_web.mjs");
  const read = async (tower) => new Uint8Array(await (await fetch(`/served/${tower}_encoder.onnx`)).arrayBuffer());
  const [image, text] = [await read("image"), await read("text")];
  const found = {};
  for (const build of builds) {
    const ort = await import(`onnxruntime-web/${build}`);
    ort.env.wasm.wasmPaths = "/modules/onnxruntime-web/dist/";
    ort.env.wasm.numThreads = 1;
    ort.env.logLevel = "fatal";
    try {
      found[build] = await embed(ort, image, text, asked);
    } catch (error) {
      found[build] = { refused: String(error.message ?? error) };
    }
  }
  return found;
};
const asked = JSON.parse(readFileSync(request, "utf-8"));
console.log(JSON.stringify(await inBrowser(modules, imports, { served: folder }, inside, { builds: BUILDS, asked })));
