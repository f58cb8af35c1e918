// Embeds images and texts with transformers.js under Node from a package on disk; prints JSON.
import { readFileSync } from "node:fs";
import { createRequire } from "node:module";
import path from "node:path";
import { pathToFileURL } from "node:url";
import { embed } from "./embed_transformersjs.mjs";

const [modules, folder, request] = process.argv.slice(2);
const file = createRequire(path.join(modules, "index.js")).resolve("@huggingface/transformers");
const library = await import(pathToFileURL(file));
library.env.allowRemoteModels = false;
library.env.localModelPath = path.dirname(folder);
const asked = JSON.parse(readFileSync(request, "utf-8"));
console.log(JSON.stringify(await embed(library, asked, asked.images, path.basename(folder))));
