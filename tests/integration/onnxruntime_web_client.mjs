// Embeds pixels and ids with onnxruntime-web's wasm under Node from a package on disk; prints JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { embed } from "./embed_onnxruntime_web.mjs";

const [modules, folder, request] = process.argv.slice(2);
const ort = createRequire(path.join(modules, "index.js"))("onnxruntime-web");
ort.env.wasm.numThreads = 1;
const [image, text] = ["image", "text"].map((tower) => readFileSync(path.join(folder, `${tower}_encoder.onnx`)));
console.log(JSON.stringify(await embed(ort, image, text, JSON.parse(readFileSync(request, "utf-8")))));
process.exit(0); // its workers would keep the process
