"""How near do real clients come to the golden vectors? Runs the integration tests and keeps what they measured.

    python benchmarks/clients.py --name clients

Cosines are the least of all golden images or texts; those of images that the client resized stand one by one.
"""

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from xml.etree import ElementTree

import results


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--name", default="clients")
    arguments = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        report = Path(folder) / "report.xml"
        command = ["pytest", "-q", "-m", "integration", "tests/integration", f"--junitxml={report}"]
        subprocess.run([sys.executable, "-m", *command], cwd=results.ROOT, check=True)
        rows = rows_of(report)
    columns = [
        ("client", "client", "s"),
        ("model", "model", "s"),
        ("given", "given pixels", ".5f"),
        ("texts", "golden texts", ".5f"),
        ("photo", "its resize: photo", ".3f"),
        ("portrait", "portrait with alpha", ".3f"),
        ("grey", "small grey", ".3f"),
    ]
    results.measured_here(rows, columns=columns).write(results.FOLDER / f"{arguments.name}.json")


def rows_of(report: Path) -> list[dict[str, object]]:
    """A row for each client and mini of a JUnit report."""
    rows = []
    for entry in ElementTree.parse(report).iter("property"):
        if entry.get("name") != "cosines":
            continue
        found = json.loads(entry.get("value") or "")
        row = {"client": found["client"], "model": found["model"], "texts": min(found["texts"])}
        if "image_embeds" in found:
            row["given"] = min(found["image_embeds"])
        rows.append(row | dict(zip(("photo", "portrait", "grey"), found.get("own_resize", ()), strict=False)))
    return sorted(rows, key=lambda row: row["client"])


if __name__ == "__main__":
    main()
