"""What `d4c-onnx serve` is like under load: the first answer, eight clients at a time, and many minutes of them.

    python benchmarks/serving.py exported/mini-vit exported/mini-vit/w4a8 --name serving
    python benchmarks/serving.py exported/mini-vit/w4a8 --minutes 10

Each bundle gets a server of its own on a free port. Bundles take turns, in a new order each round, and only the one
whose turn it is is asked: by `hey` (apt install hey), which also counts what is not answered with 200. With --minutes
nothing is compared: one bundle is asked all that time, and the server's memory is looked at every quarter of a minute.
"""

import argparse
import io
import json
import random
import re
import shutil
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import ExitStack, contextmanager
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import results
from PIL import Image

from d4c_onnx.bundle import open_bundle

_SERVE = [sys.executable, "-c", "from d4c_onnx.cli import main; main()", "serve", "--port", "0"]
_TEXTS = json.dumps({"texts": ["a photo of a cat on a green sofa."]}).encode("utf-8")
_MEGABYTE = 2**20


@dataclass(frozen=True)
class Server:
    """One that runs.

    Attributes:
        name: the model's and the bundle's width.
        first_seconds: from starting the process to its first embedding.
    """

    name: str
    url: str
    pid: int
    first_seconds: float

    def memory(self) -> int:
        """Bytes resident."""
        status = Path(f"/proc/{self.pid}/status").read_text("utf-8")
        return 1024 * int(re.findall(r"VmRSS:\s+(\d+)", status)[0])


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("bundles", nargs="+", type=Path, help="the first is the baseline")
    parser.add_argument("--clients", type=int, default=8)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--seconds", type=float, default=5, help="of a turn")
    parser.add_argument("--threads", type=int, default=0, help="of each server's encoders")
    parser.add_argument("--minutes", type=float, help="ask the last bundle so long, and watch its memory")
    parser.add_argument("--name", help="result file to write in docs/results")
    arguments = parser.parse_args()
    if shutil.which("hey") is None:
        raise SystemExit("hey is not here. Run: apt install hey")
    with tempfile.TemporaryDirectory() as folder:
        bodies = _bodies(Path(folder))
        columns, rows = _watched(arguments, bodies) if arguments.minutes else _raced(arguments, bodies)
    if arguments.name:
        made = results.measured_here(rows, threads=arguments.threads, columns=columns)
        made.write(results.FOLDER / f"{arguments.name}.json")
    else:
        print(json.dumps(rows, indent=1))


def _bodies(folder: Path) -> dict[str, tuple[str, Path]]:
    """What is asked: path -> content type and a file."""
    noise = np.random.default_rng(0).integers(0, 256, (12, 16, 3), np.uint8)
    picture = io.BytesIO()
    Image.fromarray(noise).resize((640, 480), Image.Resampling.BICUBIC).save(picture, "JPEG")
    found = {}
    for path, kind, content in (
        ("embed/image", "image/jpeg", picture.getvalue()),
        ("embed/text", "application/json", _TEXTS),
    ):
        file = folder / path.replace("/", "-")
        file.write_bytes(content)
        found[path] = kind, file
    return found


@contextmanager
def _server(bundle: Path, threads: int, bodies: dict[str, tuple[str, Path]]) -> Iterator[Server]:
    begun = time.perf_counter()
    command = [*_SERVE, str(bundle), "--threads", str(threads)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as process:
        try:
            assert process.stdout is not None
            url = re.search(r"http://\S+", process.stdout.readline())
            if url is None:
                raise SystemExit(f"{bundle}: its server does not start.")
            kind, file = bodies["embed/image"]
            ask = urllib.request.Request(f"{url[0]}/embed/image", file.read_bytes(), {"Content-Type": kind})
            with urllib.request.urlopen(ask) as answer:
                json.load(answer)
            seconds = time.perf_counter() - begun
            found = open_bundle(bundle, verify=False)
            yield Server(f"{found.model_name} {found.manifest.bits}", url[0], process.pid, seconds)
        finally:
            process.terminate()


def _raced(arguments: argparse.Namespace, bodies: dict[str, tuple[str, Path]]) -> tuple[list, list]:
    rates: dict[tuple[str, str], list[float]] = {}
    errors: dict[str, int] = {}
    starts: dict[str, list[float]] = {}
    for _ in range(arguments.rounds):  # cold starts, one process at a time
        for bundle in arguments.bundles:
            with _server(bundle, arguments.threads, bodies) as server:
                starts.setdefault(server.name, []).append(server.first_seconds)
    with ExitStack() as stack:
        servers = [stack.enter_context(_server(one, arguments.threads, bodies)) for one in arguments.bundles]
        turns = [(server, path) for server in servers for path in bodies]
        for round_ in range(arguments.rounds):
            random.Random(round_).shuffle(turns)
            for server, path in turns:
                rate, failed = _asked(server, path, bodies, arguments.clients, arguments.seconds)
                rates.setdefault((server.name, path), []).append(rate)
                errors[server.name] = errors.get(server.name, 0) + failed
        memory = {server.name: server.memory() for server in servers}
    rows = []
    for server in servers:
        images, texts = ([*rates[server.name, path]] for path in bodies)
        rows.append(
            {
                "name": server.name,
                "first_seconds": round(statistics.median(starts[server.name]), 2),
                "images_per_second": round(statistics.median(images), 1),
                "texts_per_second": round(statistics.median(texts), 1),
                "megabytes": round(memory[server.name] / _MEGABYTE),
                "errors": errors[server.name],
                "rounds": {"first": starts[server.name], "images": images, "texts": texts},
            }
        )
    return [
        ("name", "served", "s"),
        ("first_seconds", "start to first embedding, s", ".2f"),
        ("images_per_second", f"images a second, {arguments.clients} clients", ".0f"),
        ("texts_per_second", "texts a second", ".0f"),
        ("megabytes", "MB resident", ".0f"),
        ("errors", "errors", ".0f"),
    ], rows


def _asked(
    server: Server, path: str, bodies: dict[str, tuple[str, Path]], clients: int, seconds: float
) -> tuple[float, int]:
    """Answers of 200 a second, and how many others there were."""
    kind, file = bodies[path]
    command = ["hey", "-z", f"{seconds}s", "-c", str(clients), "-m", "POST", "-T", kind, "-D", str(file), "-t", "60"]
    done = subprocess.run([*command, f"{server.url}/{path}"], capture_output=True, text=True, check=True)
    total = float(re.findall(r"Total:\s+([\d.]+) secs", done.stdout)[0])
    statuses = {status: int(count) for status, count in re.findall(r"\[(\d{3})\]\s+(\d+) responses", done.stdout)}
    broken = sum(int(count) for count in re.findall(r"^\s+\[(\d+)\]\s+\w+ \"", done.stdout, re.MULTILINE))
    answered = statuses.pop("200", 0)
    return answered / total, sum(statuses.values()) + broken


def _watched(arguments: argparse.Namespace, bodies: dict[str, tuple[str, Path]]) -> tuple[list, list]:
    turn, ends, samples, failed, answered = 7.5, 0.0, [], 0, 0.0
    with _server(arguments.bundles[-1], arguments.threads, bodies) as server:
        ends = time.monotonic() + 60 * arguments.minutes
        while time.monotonic() < ends:
            for path in bodies:
                rate, errors = _asked(server, path, bodies, arguments.clients, turn)
                answered, failed = answered + rate * turn, failed + errors
            samples.append(round(server.memory() / _MEGABYTE, 1))
    half = samples[len(samples) // 2 :]
    row = {
        "name": server.name,
        "minutes": arguments.minutes,
        "answers": round(answered),
        "errors": failed,
        "first_megabytes": samples[0],
        "middle_megabytes": half[0],
        "last_megabytes": samples[-1],
        "samples": samples,
    }
    return [
        ("name", "served", "s"),
        ("minutes", "minutes", "g"),
        ("answers", "answers", ",.0f"),
        ("errors", "errors", ".0f"),
        ("first_megabytes", "MB after 15 s", ".0f"),
        ("middle_megabytes", "MB halfway", ".0f"),
        ("last_megabytes", "MB at the end", ".0f"),
    ], [row]


if __name__ == "__main__":
    main()
