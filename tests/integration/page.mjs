// Drives the page in headless Chromium as a person does, mouse and keyboard; prints JSON about what it shows.
import { createRequire } from "node:module";
import { mkdtempSync, rmSync } from "node:fs";
import { tmpdir } from "node:os";
import path from "node:path";

const [modules, chromium, request] = process.argv.slice(2);
const { chromium: driver } = createRequire(path.join(modules, "index.js"))("playwright-core");
const { url, photos, labels, screenshots } = JSON.parse(request);
const flags = ["--no-sandbox", "--disable-gpu", "--disable-quic", "--no-first-run", "--disable-background-networking",
  "--disable-component-update", "--disable-sync"];
const folder = mkdtempSync(path.join(tmpdir(), "page-"));
const browser = await driver.launchPersistentContext(folder, { executablePath: chromium, headless: true, args: flags });
const page = await browser.newPage();
const asked = new Set(), faults = [];
page.on("request", (found) => asked.add(new URL(found.url()).origin));
page.on("pageerror", (error) => faults.push(String(error)));
page.on("console", (message) => message.type() === "error" && faults.push(message.text()));

const table = () => page.locator("article").evaluateAll((articles) => articles.map((article) => ({
  name: article.querySelector("h2").textContent,
  shown: article.querySelector("img").naturalWidth > 0,
  head: [...article.querySelectorAll("thead th")].map((cell) => cell.textContent),
  rows: [...article.querySelectorAll("tbody tr")].map((row) => [...row.children].map((cell) => cell.textContent)),
})));
const done = () => page.waitForFunction(() => /ms for the labels/.test(document.getElementById("status").textContent));

await page.goto(url);
await page.getByRole("button", { name: "Score" }).and(page.locator(":enabled")).waitFor();
const model = await page.locator("#model").textContent();
await page.getByRole("button", { name: "Score" }).click();
const without = await page.getByRole("status").textContent();

await page.getByLabel("Labels, one a line").fill(labels.join("\n"));
await page.getByLabel("Pictures").setInputFiles(photos);
await done();
const chosen = await table(), status = await page.getByRole("status").textContent();
await page.screenshot({ path: screenshots[0], fullPage: true });

// by keyboard alone: from the pictures on, to a further label, to the button
await page.getByLabel("Pictures").focus();
await page.keyboard.press("Tab");
await page.keyboard.press("Control+End");
await page.keyboard.type("\nlorry");
await page.keyboard.press("Tab");
await page.keyboard.press("Tab");
await page.keyboard.press("Enter");
await page.waitForFunction(() => document.querySelector("tbody").rows.length > 0 &&
  [...document.querySelectorAll("tbody th")].some((cell) => cell.textContent === "lorry"));
const typed = await table();

// a picture that is dropped, and then a file that only says it is one
const drop = (name, bytes) => page.evaluate(([name, bytes]) => {
  const transfer = new DataTransfer();
  transfer.items.add(new File([Uint8Array.from(bytes)], name, { type: "image/png" }));
  document.getElementById("drop").dispatchEvent(new DragEvent("drop", { bubbles: true, dataTransfer: transfer }));
}, [name, bytes]);
const { readFileSync } = await import("node:fs");
await drop("<b>dropped</b>.png", [...readFileSync(photos[0])]);
await page.getByText("<b>dropped</b>.png").waitFor();
await done();
const dropped = await table();
const before = faults.length;
await drop("broken.png", [1, 2, 3]);
await page.locator("#status.error").waitFor();
const refused = await page.getByRole("status").textContent();
faults.splice(before); // the browser's own line about the refused request

await page.setViewportSize({ width: 320, height: 700 });
const overflow = await page.evaluate(() => Math.max(
  ...[document.documentElement, ...document.querySelectorAll(".table")].map((box) => box.scrollWidth - box.clientWidth)));
await page.screenshot({ path: screenshots[1], fullPage: true });
console.log(JSON.stringify({ model, without, status, chosen, typed, dropped, refused, overflow, asked: [...asked], faults }));
await browser.close();
rmSync(folder, { recursive: true, force: true, maxRetries: 5 });
