"""How much memory photos take: `evaluate` on 100 of 24 megapixels, and `--method real` on a folder of them.

    python benchmarks/photos.py --photos 100 --limit-mb 1000

Exit code 1 when the peak of `evaluate` is above the limit.
"""

import argparse
import io
import json
import subprocess
import sys
import tempfile
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from PIL import Image

# the command, and then its own peak: getrusage's maximum would be that of the process that started it
COMMAND = """
import sys
from d4c_onnx.cli.main import group
try:
    group(sys.argv[1:])
finally:
    [peak] = [int(line.split()[1]) // 1024 for line in open("/proc/self/status") if line.startswith("VmHWM")]
    print("peak", peak, file=sys.stderr)
"""


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--photos", type=int, default=100)
    parser.add_argument("--megapixels", type=float, default=24.0)
    parser.add_argument("--limit-mb", type=int, default=1000)
    args = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder)
        _run("export", "mini-vit", "-o", str(place))
        photos = [_photo(args.megapixels, number) for number in range(8)]
        blobs = [photos[number % len(photos)] for number in range(args.photos)]
        rows = [{"bytes": blob, "path": None} for blob in blobs]
        pq.write_table(pa.table({"image": rows, "label": [0, 1] * (args.photos // 2)}), place / "photos.parquet")
        (place / "photos.parquet.classes.txt").write_text("cat\ndog\n")
        (place / "photos").mkdir()
        for number, blob in enumerate(blobs):
            (place / "photos" / f"{number:03d}.jpg").write_bytes(blob)
        bundle, few = str(place / "mini-vit"), ("text.prompts=8", "text.held_out=4", "synthesis.held_out=4")
        real = ("--method", "real", "--source", str(place / "photos"), "--images", str(args.photos - 4))
        found = {
            "evaluate": _run("evaluate", bundle, "--dataset", str(place / "photos.parquet")),
            "synthesize --method real": _run("synthesize", bundle, *real, *(f"--set={key}" for key in few)),
        }
        size = sum(map(len, blobs)) / 1e6
    print(
        json.dumps({"photos": args.photos, "megapixels": args.megapixels, "encoded_mb": round(size), "peak_mb": found})
    )
    sys.exit(found["evaluate"] > args.limit_mb)  # the other holds torch, too


def _photo(megapixels: float, seed: int) -> bytes:
    """A JPEG in the proportions of a camera's, of smooth colours and some noise."""
    height = round((megapixels * 1e6 / 1.5) ** 0.5)
    rng = np.random.default_rng(seed)
    coarse = Image.fromarray(rng.integers(0, 256, (24, 36, 3), np.uint8)).resize((height * 3 // 2, height))
    noisy = np.asarray(coarse) ^ rng.integers(0, 16, (height, height * 3 // 2, 1), np.uint8)
    file = io.BytesIO()
    Image.fromarray(noisy).save(file, "JPEG", quality=90)
    return file.getvalue()


def _run(*arguments: str) -> int:
    """Megabytes at the peak of a command."""
    done = subprocess.run(
        [sys.executable, "-P", "-c", COMMAND, *arguments, "--quiet", "--json"],
        capture_output=True,
        text=True,
        check=False,
    )
    peaks = [line for line in done.stderr.splitlines() if line.startswith("peak")]
    if done.returncode or not peaks:
        sys.exit(f"{' '.join(arguments)}: exit code {done.returncode}\n{done.stdout}{done.stderr}"[:4000])
    return int(peaks[-1].split()[1])


if __name__ == "__main__":
    main()
