// A page of localhost in headless Chromium, with nothing else of the world; `inside` runs there and gives its value.
import { createReadStream, existsSync, mkdtempSync, rmSync, statSync } from "node:fs";
import http from "node:http";
import { createRequire } from "node:module";
import os from "node:os";
import path from "node:path";
import { fileURLToPath } from "node:url";

const TYPES = { ".mjs": "text/javascript", ".js": "text/javascript", ".wasm": "application/wasm", ".json": "application/json" };
const FLAGS = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking"];
const QUIET = ["--disable-component-update", "--disable-sync"];

export async function inBrowser(modules, imports, roots, inside, argument) {
  const { chromium } = createRequire(path.join(modules, "index.js"))("playwright-core");
  const page_html = `<!doctype html><script type="importmap">${JSON.stringify({ imports })}</script>`;
  const places = { ...roots, here: path.dirname(fileURLToPath(import.meta.url)), modules: path.join(modules, "node_modules") };
  const server = http.createServer((request, response) => {
    const [, root, ...rest] = decodeURIComponent(request.url.split("?")[0]).split("/");
    if (root === "") {
      response.setHeader("content-type", "text/html");
      return response.end(page_html);
    }
    const file = path.join(places[root] ?? "/nowhere", ...rest);
    if (rest.includes("..") || !existsSync(file) || !statSync(file).isFile()) {
      response.statusCode = 404;
      return response.end();
    }
    response.setHeader("content-type", TYPES[path.extname(file)] ?? "application/octet-stream");
    createReadStream(file).pipe(response);
  });
  await new Promise((ready) => server.listen(0, "127.0.0.1", ready));
  const profile = mkdtempSync(path.join(os.tmpdir(), "d4c-chromium-"));
  const settings = { executablePath: process.env.D4C_CHROMIUM, headless: true, args: [...FLAGS, ...QUIET] };
  const context = await chromium.launchPersistentContext(profile, settings);
  try {
    const page = await context.newPage();
    await page.goto(`http://127.0.0.1:${server.address().port}/`);
    return await page.evaluate(inside, argument);
  } finally {
    await context.close();
    server.close();
    rmSync(profile, { recursive: true, force: true });
  }
}
