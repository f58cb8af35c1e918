"""Do quantised bundles answer alike elsewhere? Older onnxruntime releases and OpenVINO, each in its own environment.

    python benchmarks/other_runtimes.py exported/mini-vit/w4a8 exported/mini-vit/w4a8-nibbles \
        --runtimes onnxruntime==1.20.1 onnxruntime==1.23.2 openvino --write runtimes-mini-vit-zen5

Answers are compared with those of the onnxruntime that runs this script, its optimiser off: with what the file says.
Times are of batch 8 with two threads: each round opens a session in every runtime, runs it 50 times and takes the
median; printed are the medians of the rounds. Memory is what the process took at most while it loaded and ran, less
what it had before. Installs each runtime and numpy with pip, into `--environments` where they stay for the next time.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort
import results

from d4c_onnx.bundle import open_bundle
from d4c_onnx.evaluation.latency import drawn_feeds
from d4c_onnx.runtime.session import EncoderSession

# How each runtime becomes a function from a batch to embeddings; the version it shows.
LOADERS = {
    "onnxruntime": """
import onnxruntime as ort
def load(file, entries):
    options = ort.SessionOptions()
    for key, value in entries.items():
        options.add_session_config_entry(key, value)
    options.intra_op_num_threads, options.log_severity_level = 2, 4
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    return lambda batch: session.run(None, {session.get_inputs()[0].name: batch})[0]
""",
    "openvino": """
import openvino
def load(file, entries):
    core = openvino.Core()
    settings = {"INFERENCE_NUM_THREADS": 2, "PERFORMANCE_HINT": "LATENCY"}
    model = core.compile_model(core.read_model(file), "CPU", settings)
    return lambda batch: model(batch)[model.output(0)]
""",
}
PROBE = """
import json, sys, time
import numpy as np
file, feed, answer, entries = sys.argv[1:]
def taken():
    return next(int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")) / 1024
before = taken()
try:
    start = time.perf_counter()
    run = load(file, json.loads(entries))
    load_ms = 1e3 * (time.perf_counter() - start)
    batch, times = np.load(feed), []
    for _ in range(50):
        start = time.perf_counter()
        got = run(batch)
        times.append(time.perf_counter() - start)
    expected = np.load(answer)
    found = {
        "difference": float(np.abs(got - expected).max()),
        "cosine": float((got * expected).sum(-1).min()),
        "load_ms": load_ms,
        "memory_mb": taken() - before,
        "ms": 1e3 * float(np.median(times[10:])),
    }
except Exception as error:
    found = {"refused": " ".join(str(error).split())[:110]}
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--runtimes", nargs="+", default=["onnxruntime==1.20.1", "onnxruntime==1.23.2", "openvino"])
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--environments", type=Path, help="where they are kept  [a temporary folder]")
    parser.add_argument("--write", metavar="NAME", help="of a result file in docs/results")
    args = parser.parse_args()
    rows: list[dict[str, Any]] = []
    print("| bundle | needs | runtime | tower | largest difference | least cosine | load ms | batch 8, ms | MB |")
    print("|---|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pythons = {f"onnxruntime {ort.__version__}": Path(sys.executable)}
        for runtime in args.runtimes:
            shown = runtime.replace("==", " ")
            pythons[shown] = _environment((args.environments or Path(folder)) / runtime, runtime)
        for path in args.bundles:
            bundle = open_bundle(path)
            feeds = drawn_feeds(bundle, [8], 16)
            for tower, encoder in bundle.encoders.items():
                feed, answer = Path(folder) / "feed.npy", Path(folder) / "answer.npy"
                np.save(feed, feeds[tower][8])
                entries = bundle.session_entries
                literal = EncoderSession(encoder, threads=2, optimize=False, literal=True, entries=entries)
                np.save(answer, literal.run(feeds[tower][8]))
                rounds: dict[str, list[dict[str, Any]]] = {runtime: [] for runtime in pythons}
                for _ in range(args.rounds):
                    for runtime, found in rounds.items():
                        loader = next(code for name, code in LOADERS.items() if runtime.startswith(name))
                        found.append(_probe(pythons[runtime], loader, encoder, feed, answer, json.dumps(entries)))
                needs = quantization.minimum_onnxruntime if (quantization := bundle.manifest.quantization) else "-"
                for runtime, found in rounds.items():
                    print(f"| {path.name} | {needs} | {runtime} | {tower} | {_cells(found)} |", flush=True)
                    told = {"model": bundle.model_name, "bundle": path.name, "needs": needs, "runtime": runtime}
                    rows.append({**told, "tower": tower, **_summary(found)})
    if args.write:
        results.measured_here(rows, threads=2).write(results.FOLDER / f"{args.write}.json")


def _environment(home: Path, runtime: str) -> Path:
    """The python of an environment with that runtime; releases before 1.19 are built for numpy 1."""
    python = home / "bin" / "python"
    if not python.exists():
        venv.create(home, with_pip=True)
        name, _, version = runtime.partition("==")
        old = name == "onnxruntime" and version and tuple(map(int, version.split(".")[:2])) < (1, 19)
        packages = [runtime, "numpy<2" if old else "numpy"]
        subprocess.run([python, "-P", "-m", "pip", "install", "-q", *packages], check=True)
    return python


def _summary(rounds: list[dict[str, Any]]) -> dict[str, Any]:
    """Worst answers and median times of the rounds; or why there are none."""
    if "refused" in rounds[0]:
        return {"refused": rounds[0]["refused"]}
    load, run, memory = (float(np.median([found[key] for found in rounds])) for key in ("load_ms", "ms", "memory_mb"))
    return {
        "difference": float(f"{max(found['difference'] for found in rounds):.3g}"),
        "cosine": round(min(found["cosine"] for found in rounds), 6),
        "load_ms": round(load, 1),
        "batch8_ms": round(run, 3),
        "memory_mb": round(memory, 1),
    }


def _cells(rounds: list[dict[str, Any]]) -> str:
    found = _summary(rounds)
    return f"{found['refused']} | | | |" if "refused" in found else " | ".join(str(value) for value in found.values())


def _probe(python: Path, loader: str, *arguments: Path | str) -> dict[str, Any]:
    done = subprocess.run([python, "-P", "-c", loader + PROBE, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
