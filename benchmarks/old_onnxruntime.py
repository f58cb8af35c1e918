"""Do quantised bundles answer alike under older releases of onnxruntime? Each release gets an environment of its own.

    python benchmarks/old_onnxruntime.py exported/mini-vit/w4a8 exported/mini-vit/w4a8-nibbles --releases 1.20.1 1.23.2

Answers are compared with those of the onnxruntime that runs this script; times are medians of runs at batch 8 with two
threads. Installs `onnxruntime==RELEASE` and numpy with pip.
"""

import argparse
import json
import subprocess
import sys
import tempfile
import venv
from pathlib import Path

import numpy as np

from d4c_onnx.bundle import open_bundle
from d4c_onnx.evaluation.latency import drawn_feeds
from d4c_onnx.runtime.session import EncoderSession

PROBE = """
import json, sys, time
import numpy as np, onnxruntime as ort
file, feed, answer = sys.argv[1:]
options = ort.SessionOptions()
options.intra_op_num_threads, options.log_severity_level = 2, 4
try:
    start = time.perf_counter()
    session = ort.InferenceSession(file, options, providers=["CPUExecutionProvider"])
    load = time.perf_counter() - start
    batch, times = np.load(feed), []
    for _ in range(12):
        start = time.perf_counter()
        (got,) = session.run(None, {session.get_inputs()[0].name: batch})
        times.append(time.perf_counter() - start)
    expected = np.load(answer)
    found = {
        "difference": float(np.abs(got - expected).max()),
        "cosine": float((got * expected).sum(-1).min()),
        "load_ms": 1e3 * load,
        "ms": 1e3 * float(np.median(times[2:])),
    }
except Exception as error:
    found = {"refused": " ".join(str(error).split())[:110]}
print(json.dumps(found))
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--releases", nargs="+", default=["1.20.1", "1.23.2"])
    args = parser.parse_args()
    print("| bundle | needs | onnxruntime | tower | largest difference | least cosine | load ms | batch 8, ms |")
    print("|---|---|---|---|---|---|---|---|")
    with tempfile.TemporaryDirectory() as folder:
        pythons = {"this": Path(sys.executable)}
        for release in args.releases:
            home = Path(folder) / release
            venv.create(home, with_pip=True)
            pythons[release] = home / "bin" / "python"
            install = [pythons[release], "-m", "pip", "install", "-q", f"onnxruntime=={release}", "numpy"]
            subprocess.run(install, check=True)
        for path in args.bundles:
            bundle = open_bundle(path)
            feeds = drawn_feeds(bundle, [8], 16)
            for tower, encoder in bundle.encoders.items():
                feed, answer = Path(folder) / "feed.npy", Path(folder) / "answer.npy"
                np.save(feed, feeds[tower][8])
                np.save(answer, EncoderSession(encoder, threads=2).run(feeds[tower][8]))
                for release, python in pythons.items():
                    done = subprocess.run(
                        [python, "-c", PROBE, encoder, feed, answer], capture_output=True, text=True, check=True
                    )
                    found = json.loads(done.stdout.splitlines()[-1])
                    shown = found.get("refused") or (
                        f"{found['difference']:.2e} | {found['cosine']:.6f} "
                        f"| {found['load_ms']:.0f} | {found['ms']:.2f}"
                    )
                    needs = bundle.manifest.get("minimum_onnxruntime", "-")
                    print(f"| {path.name} | {needs} | {release} | {tower} | {shown} |", flush=True)


if __name__ == "__main__":
    main()
