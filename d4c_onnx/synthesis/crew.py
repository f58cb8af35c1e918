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

from d4c_onnx.calibration.method import Method
from d4c_onnx.errors import RecipeError
from d4c_onnx.recipe import SynthesisSection

T = TypeVar("T")


@dataclass(frozen=True, slots=True)
class Crew:
    """One process among `size`; alone by default."""

    rank: int = 0
    size: int = 1

    def wait(self) -> None:
        """Until every process has come here."""
        if self.size > 1:
            torch.distributed.barrier()

    def one_by_one(self, work: Callable[[], T]) -> T:
        """The first process does it alone; the others do it when it has, and find what it left."""
        if self.rank == 0:
            result = work()
            self.wait()
            return result
        self.wait()
        return work()

    def mine(self, number: int) -> bool:
        """Whether a unit of that number is for this process."""
        return number % self.size == self.rank


def join_crew(rank: int, size: int, local_rank: int = 0) -> Crew:
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
    return Crew(rank, size)


def check_divisible(section: SynthesisSection, method: Method, crew: Crew) -> None:
    """Refuse what asks for batches that know nothing of each other where they do.

    Raises:
        RecipeError: several processes, or an early stop, with one optimiser for all images; several with an early stop.
    """
    tolerance = section.early_stop_tolerance
    if tolerance is not None and method.shared_optimizer:
        raise RecipeError(
            "synthesis.early_stop_tolerance: needs batches that are finished one by one. This method has one optimiser "
            "for all images: use method: d4c."
        )
    bound = "method" if method.shared_optimizer else "early_stop_tolerance" if tolerance is not None else None
    if crew.size > 1 and bound:
        raise RecipeError(
            f"synthesis.{bound}: makes batches depend on each other, so several processes cannot share them. "
            "Run one process."
        )
