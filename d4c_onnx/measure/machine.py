"""Where things run."""

from dataclasses import dataclass


@dataclass(frozen=True, slots=True)
class Machine:
    """Where things run.

    Attributes:
        provider: onnxruntime's.
        device: torch's.
        threads: 0 is each engine's own choice.
        rank, world_size, local_rank: of this process, where torch's launcher started several.
    """

    provider: str = "auto"
    device: str = "auto"
    threads: int = 0
    rank: int = 0
    world_size: int = 1
    local_rank: int = 0
