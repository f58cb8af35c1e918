"""What an installation costs: seconds and megabytes of `pip install` in a fresh environment, and what runs there.

    python benchmarks/install.py --bundle exported/mini-vit

Wheels come from wherever pip takes them (a cache, a mirror): seconds say as much about that as about the package.
"""

import argparse
import subprocess
import sys
import tempfile
import time
from pathlib import Path

import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--bundle", type=Path, required=True, help="is verified there")
    parser.add_argument("--extras", nargs="*", default=[""], help="such as export; an empty one: none")
    parser.add_argument("--name", default="install")
    arguments = parser.parse_args()
    rows = [_install(extra, arguments.bundle) for extra in arguments.extras]
    columns = [
        ("what", "pip install", "s"),
        ("seconds", "seconds", ".0f"),
        ("megabytes", "MB", ".0f"),
        ("verify_seconds", "`d4c-onnx verify` there, seconds", ".1f"),
    ]
    results.measured_here(rows, columns=columns).write(results.FOLDER / f"{arguments.name}.json")


def _install(extra: str, bundle: Path) -> dict[str, object]:
    with tempfile.TemporaryDirectory() as folder:
        place = Path(folder) / "venv"
        subprocess.run([sys.executable, "-m", "venv", place], check=True)
        before = _megabytes(place)
        wanted = f"{results.ROOT}[{extra}]" if extra else str(results.ROOT)
        begun = time.perf_counter()
        subprocess.run([place / "bin" / "pip", "install", "--quiet", wanted], check=True)
        seconds = time.perf_counter() - begun
        begun = time.perf_counter()
        subprocess.run([place / "bin" / "d4c-onnx", "verify", bundle.resolve(), "--quiet"], check=True, cwd=folder)
        verified = time.perf_counter() - begun
        name = f"d4c-onnx[{extra}]" if extra else "d4c-onnx"
        size = _megabytes(place) - before
    return {"what": name, "seconds": round(seconds, 1), "megabytes": round(size), "verify_seconds": round(verified, 2)}


def _megabytes(folder: Path) -> float:
    return sum(file.stat().st_size for file in folder.rglob("*") if file.is_file() and not file.is_symlink()) / 1e6


if __name__ == "__main__":
    main()
