"""How fast encoders run, side by side in one run: interleaved, warmed up, medians with their spread.

A machine's speed drifts while other work comes and goes. So no contender is timed alone: in every round each one runs
once, and ratios are those of medians over the same rounds. Every round has an order of its own: a contender finds the
caches as the one before left them, and at batch 1 always running after FP32, say, costs some per cent.
"""

import json
import platform
import statistics
import subprocess
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields
from pathlib import Path
from typing import Any

import numpy as np
import onnxruntime as ort

from d4c_onnx.bundle import Bundle, file_size_bytes
from d4c_onnx.errors import BundleError
from d4c_onnx.evaluation.benchmark_report import BatchTiming, LatencyRow, Loading, MachineDescription
from d4c_onnx.progress import OnStep, silent
from d4c_onnx.runtime.gpu import gpu_name
from d4c_onnx.runtime.session import EncoderSession

_WARM_UP, _LOADS = 2, 3
# A session in a process of its own: how long it loads and its first batch takes, what it adds to the resident memory
# when it loads, how much of that is held (the rest is what the allocator keeps for later), the peak after a batch, and
# what it took of a GPU by then.
_PROCESS_PROBE = """
import json, os, sys, time
import numpy as np
from pathlib import Path
from typing import Any
from d4c_onnx.memory import release_freed
from d4c_onnx.runtime.gpu import gpu_used_bytes
from d4c_onnx.runtime.session import EncoderSession, resolve_provider
def resident():
    if not Path("/proc/self/statm").exists():
        return None
    return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
asked = json.loads(sys.argv[1])
first, largest = (np.ones(shape, asked["dtype"]) for shape in asked["shapes"])
resolve_provider(asked["provider"])  # tries a session of its own
before = resident()
gpu_before = gpu_used_bytes() if asked["provider"] == "cuda" else None
start = time.perf_counter()
session = EncoderSession(Path(asked["path"]), asked["provider"], asked["threads"], entries=asked["entries"])
load_ms = 1e3 * (time.perf_counter() - start)
loaded = held = peak = None
if before is not None:
    loaded = held = resident() - before
    if release_freed():
        held = resident() - before
start = time.perf_counter()
session.run(first)
first_ms = 1e3 * (time.perf_counter() - start)
session.run(largest)
if before is not None:  # getrusage's maximum would be that of the process that started this one
    [peak] = [1024 * int(line.split()[1]) for line in open("/proc/self/status") if line.startswith("VmHWM")]
gpu = None if gpu_before is None else gpu_used_bytes() - gpu_before
found = {"load_ms": load_ms, "first_ms": first_ms, "loaded_bytes": loaded, "held_bytes": held, "peak_bytes": peak}
found["gpu_bytes"] = gpu
print(json.dumps(found))
"""


@dataclass(frozen=True, slots=True)
class Contender:
    """What races.

    Attributes:
        name: for the table.
        encoders: the encoder file of each tower that it has.
        entries: session config entries that it is served with.
    """

    name: str
    encoders: Mapping[str, Path]
    entries: Mapping[str, str] = field(default_factory=dict)


def measure_latency(
    contenders: Sequence[Contender],
    feeds: Mapping[str, Mapping[int, np.ndarray]],
    *,
    rounds: int = 15,
    provider: str = "cpu",
    threads: int = 0,
    on_step: OnStep = silent,
) -> dict[str, list[LatencyRow]]:
    """Time every contender at every batch size.

    Args:
        contenders: the baseline first.
        feeds: per tower and batch size, what is fed.
        rounds: timed runs of each contender at each batch.

    Returns:
        Per tower one row a contender; its costs of loading are medians, too.

    Raises:
        BundleError: onnxruntime cannot load a file.
    """
    steps = sum(len(batches) * rounds for batches in feeds.values())
    done = 0
    order = np.random.default_rng(0)

    def count() -> None:
        nonlocal done
        done += 1
        on_step("benchmark", done, steps, {})

    result: dict[str, list[LatencyRow]] = {}
    for tower, batches in feeds.items():
        running = [entry for entry in contenders if tower in entry.encoders]
        probes: dict[str, list[Loading]] = {entry.name: [] for entry in running}
        for _ in range(_LOADS):
            for entry in running:
                probes[entry.name].append(_probe(entry, tower, batches, provider, threads))
        sessions = {
            entry.name: EncoderSession(entry.encoders[tower], provider, threads, shared=True, entries=entry.entries)
            for entry in running
        }
        timed = {size: _race(sessions, feed, rounds, order, count) for size, feed in batches.items()}
        result[tower] = [
            LatencyRow(
                entry.name,
                file_size_bytes(entry.encoders[tower]),
                _medians(probes[entry.name]),
                {size: _timing(times[entry.name], times[running[0].name], size) for size, times in timed.items()},
            )
            for entry in running
        ]
    return result


def _race(
    sessions: Mapping[str, EncoderSession],
    feed: np.ndarray,
    rounds: int,
    order: np.random.Generator,
    on_round: Callable[[], None],
) -> dict[str, list[float]]:
    """Seconds of each session's runs: in every round each one runs once, in an order of the round's own."""
    names = list(sessions)
    times: dict[str, list[float]] = {name: [] for name in names}
    for _ in range(_WARM_UP):
        for session in sessions.values():
            session.run(feed)
    for _ in range(rounds):
        for name in (names[number] for number in order.permutation(len(names))):
            start = time.perf_counter()
            sessions[name].run(feed)
            times[name].append(time.perf_counter() - start)
        on_round()
    return times


def _timing(seen: Sequence[float], baseline: Sequence[float], size: int) -> BatchTiming:
    low, median, high = (1e3 * float(value) for value in np.quantile(seen, (0.25, 0.5, 0.75)))
    return BatchTiming(median, low, high, 1e3 * size / median, 1e3 * statistics.median(baseline) / median)


def _probe(entry: Contender, tower: str, batches: Mapping[int, np.ndarray], provider: str, threads: int) -> Loading:
    path, small, large = entry.encoders[tower], batches[min(batches)], batches[max(batches)]
    asked = {
        "path": str(path),
        "provider": provider,
        "threads": threads,
        "entries": dict(entry.entries),
        "shapes": [small.shape, large.shape],
        "dtype": str(small.dtype),
    }
    # -P: without it a numpy.py or json.py in the current folder would be run in place of the real one
    command = [sys.executable, "-P", "-c", _PROCESS_PROBE, json.dumps(asked)]
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        raise BundleError(f"{path}: cannot be run in a process of its own ({done.stderr.strip()[-300:]}).")
    return Loading(**json.loads(done.stdout.splitlines()[-1]))


def _medians(probes: Sequence[Loading]) -> Loading:
    def median(name: str) -> Any:  # a number; None where the system does not tell
        values = [getattr(probe, name) for probe in probes]
        return None if values[0] is None else statistics.median(values)

    return Loading(*(median(entry.name) for entry in fields(Loading)))


def drawn_feeds(bundle: Bundle, batches: Sequence[int], sequence: int) -> dict[str, dict[int, np.ndarray]]:
    """Noise images and random token ids of the bundle's own shapes, per tower and batch size.

    Args:
        sequence: ids per text; a text encoder of fixed length gets its own length.
    """
    rng = np.random.default_rng(0)
    height, width = bundle.manifest.preprocess.size
    tokenizer = bundle.manifest.tokenizer
    context = tokenizer.context_length
    length = min(sequence, context) if tokenizer.dynamic_sequence else context
    end = tokenizer.eot_id or 1
    feeds: dict[str, dict[int, np.ndarray]] = {"image": {}, "text": {}}
    for size in batches:
        feeds["image"][size] = rng.standard_normal((size, 3, height, width), dtype=np.float32)
        ids = rng.integers(1, max(2, min(end, 1000)), (size, length), np.int64)
        ids[:, 0], ids[:, -1] = tokenizer.sot_id or 0, end
        if not tokenizer.causal and tokenizer.pad_id is not None:
            ids[ids == tokenizer.pad_id] = tokenizer.pad_id + 1  # padding would be hidden
        feeds["text"][size] = ids
    return feeds


def describe_machine(provider: str, threads: int) -> MachineDescription:
    """This machine, running onnxruntime on a provider with so many threads (0: its own choice)."""
    gpu = gpu_name() if provider == "cuda" else None
    return MachineDescription(_cpu_name(), gpu, threads or None, provider, ort.__version__)


def _cpu_name() -> str:
    info = Path("/proc/cpuinfo")
    lines = info.read_text("utf-8").splitlines() if info.exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.processor() or platform.machine()
