"""Several processes on one calibration set, started by torch's own launcher:

    torchrun --no-python --nproc-per-node 2 d4c-onnx synthesize ViT-B-32 --pretrained random

Batches are independent of each other, so each process makes every n-th one, on a device of its own, into the same work
folder; the first process puts the set together. On CPUs the files are those that one process would make with as many
threads.
"""

from collections.abc import Callable
from dataclasses import dataclass
from datetime import timedelta
from typing import TypeVar

import torch

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class ProcessGroup:
    """One process, `rank`, among `size`; alone by default."""

    rank: int = 0
    size: int = 1

    def barrier(self) -> None:
        """Wait until every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def rank_zero_first(self, work: Callable[[], T]) -> T:
        """Process 0 does it alone; the others do it when it has, and find what it left."""
        if self.rank == 0:
            result = work()
            self.barrier()
            return result
        self.barrier()
        return work()

    def owns(self, number: int) -> bool:
        """Whether the unit of that number is this process's to make: every `size`-th one is."""
        return number % self.size == self.rank


def init_process_group(rank: int, size: int, local_rank: int = 0) -> ProcessGroup:
    """Find the other processes; the launcher's environment says where they meet.

    Args:
        rank, size: this process among all.
        local_rank: among those of this machine: the number of its CUDA device.
    """
    if size > 1 and not torch.distributed.is_initialized():
        # torch gives up after half an hour; a process may wait longer than that for the last batch of another one
        torch.distributed.init_process_group("gloo", rank=rank, world_size=size, timeout=timedelta(days=30))
    if torch.cuda.is_available():
        torch.cuda.set_device(local_rank % torch.cuda.device_count())
    return ProcessGroup(rank, size)
