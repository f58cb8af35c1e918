"""Which stacks serve which bundles? Each bundle is packaged for every stack, and each package verified.

    python benchmarks/packages.py DIR/ViT-B-32/w4a8 DIR/ViT-B-32/w8a8 --name ViT-B-32__openai --results packages

A refusal is kept with its reason; a package that does not verify ends the run. Sizes are of all of a package's files.
"""

import argparse
import tempfile
import time
from pathlib import Path
from typing import Any

from results import FOLDER, measured_here
from tables import packages

from d4c_onnx.bundle import open_bundle
from d4c_onnx.errors import BundleError
from d4c_onnx.packaging import STACKS, package_bundle, verify_package


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path)
    parser.add_argument("--name", help="the model's, for stacks that know models by name")
    parser.add_argument("--results", help="name of a result file to write in docs/results")
    arguments = parser.parse_args()
    rows = [tried(path, target, arguments.name) for path in arguments.bundles for target in STACKS]
    found = measured_here(rows)
    for line in packages([found]):
        print(" | ".join(line))
    if arguments.results:
        found.write(FOLDER / f"{arguments.results}.json")


def tried(path: Path, target: str, name: str | None) -> dict[str, Any]:
    """What came of one bundle and one stack.

    Raises:
        SystemExit: a package was written that does not verify.
    """
    bundle = open_bundle(path, verify=False)
    row: dict[str, Any] = {"bundle": f"{bundle.model_name} {bundle.manifest.bits}", "target": target}
    with tempfile.TemporaryDirectory() as folder:
        begun = time.perf_counter()
        try:
            report = package_bundle(path, target, Path(folder) / "package", name=name)
        except BundleError as error:
            return row | {"refused": str(error).partition(f"{target}, which ")[2] or str(error)}
        seconds = time.perf_counter() - begun
        found = verify_package(report.path)
        if not found.ok:
            raise SystemExit(f"{row['bundle']} for {target}: {[check for check in found.checks if check.ok is False]}")
        size = sum(entry.size_bytes for entry in report.content.files.values())
    return row | {"megabytes": round(size / 1e6, 1), "seconds": round(seconds, 1)}


if __name__ == "__main__":
    main()
