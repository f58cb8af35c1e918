"""A benchmark's results, as values: what `measure_latency` finds, the CLI shows and --json prints."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass


@dataclass(frozen=True, slots=True)
class Loading:
    """What one encoder costs in a process of its own; None where the system does not tell.

    Attributes:
        load_ms, first_ms: loading, and the first batch.
        loaded_bytes, held_bytes: what loading adds to the resident memory, and what of that is in use.
        peak_bytes: of the process, after the largest batch.
        gpu_bytes: what it took of a GPU by then; on cuda only.
    """

    load_ms: float
    first_ms: float
    loaded_bytes: float | None
    held_bytes: float | None
    peak_bytes: float | None
    gpu_bytes: float | None


@dataclass(frozen=True, slots=True)
class BatchTiming:
    """Timed runs of one batch size: median and quartiles, throughput, and how many times as fast as the baseline."""

    median_ms: float
    low_ms: float
    high_ms: float
    per_second: float
    speed_up: float


@dataclass(frozen=True, slots=True)
class LatencyRow:
    """One contender's encoder of one tower; `batches` by size."""

    name: str
    size_bytes: int
    loading: Loading
    batches: Mapping[int, BatchTiming]

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        batches = {size: asdict(found) for size, found in self.batches.items()}
        return {"name": self.name, "size_bytes": self.size_bytes, **asdict(self.loading), "batches": batches}


@dataclass(frozen=True, slots=True)
class MachineDescription:
    """What a latency means nothing without; `threads` is None where they were left to onnxruntime."""

    cpu: str
    gpu: str | None
    threads: int | None
    provider: str
    onnxruntime: str

    @property
    def title(self) -> str:
        """All of it in a line."""
        threads = f"{self.threads} threads" if self.threads else "onnxruntime's choice of threads"
        provider = f"{self.provider} ({self.gpu})" if self.gpu else self.provider
        return f"{self.cpu}, {threads}, {provider}, onnxruntime {self.onnxruntime}"


@dataclass(frozen=True, slots=True)
class FailedPeer:
    """A peer that could not be built or loaded for a tower, and why."""

    name: str
    tower: str
    reason: str


@dataclass(frozen=True, slots=True)
class BenchmarkReport:
    """A benchmark: rows by tower, the baseline first, each a median of so many rounds."""

    machine: MachineDescription
    rounds: int
    towers: Mapping[str, Sequence[LatencyRow]]
    failed: Sequence[FailedPeer] = ()

    def as_dict(self) -> dict[str, object]:
        """For JSON."""
        return {
            "machine": asdict(self.machine),
            "rounds": self.rounds,
            "towers": {tower: [row.as_dict() for row in rows] for tower, rows in self.towers.items()},
            "failed": [asdict(entry) for entry in self.failed],
        }
