"""Do quantised bundles answer alike elsewhere? Older onnxruntime releases and OpenVINO, each in its own environment.

    python benchmarks/other_runtimes.py exported/mini-vit/w4a8 exported/mini-vit/w4a8-nibbles \
        --runtimes onnxruntime==1.20.1 onnxruntime==1.23.2 openvino

Answers are compared with those of the onnxruntime that runs this script, its optimiser off: with what the file says.
Times are of batch 8 with two threads: each round opens a session in every runtime, runs it 50 times and takes the
median; printed are the medians of the rounds. Installs each runtime and numpy with pip.
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
    args = parser.parse_args()
    print("| bundle | needs | runtime | tower | largest difference | least cosine | load ms | batch 8, ms |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pythons = {"onnxruntime, this one": Path(sys.executable)}
        for runtime in args.runtimes:
            home = Path(folder) / runtime
            venv.create(home, with_pip=True)
            pythons[runtime] = home / "bin" / "python"
            subprocess.run([pythons[runtime], "-P", "-m", "pip", "install", "-q", runtime, "numpy"], check=True)
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


def _cells(rounds: list[dict[str, Any]]) -> str:
    if "refused" in rounds[0]:
        return f"{rounds[0]['refused']} | | |"
    cosine = min(found["cosine"] for found in rounds)
    load, run = (float(np.median([found[name] for found in rounds])) for name in ("load_ms", "ms"))
    return f"{max(found['difference'] for found in rounds):.2e} | {cosine:.6f} | {load:.0f} | {run:.2f}"


def _probe(python: Path, loader: str, *arguments: Path | str) -> dict[str, Any]:
    done = subprocess.run([python, "-P", "-c", loader + PROBE, *arguments], capture_output=True, text=True, check=True)
    found: dict[str, Any] = json.loads(done.stdout.splitlines()[-1])
    return found


if __name__ == "__main__":
    main()
