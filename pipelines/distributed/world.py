"""The process group of the workers: rank, size, device, and collective operations."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch


@dataclass(frozen=True)
class World:
    """This process among the workers.

    Attributes:
        rank, size: as in torch.distributed.
        device: device of the model.
        lockstep: all ranks must run the same number of forward passes (ZeRO-3).
        group: gloo group for Python objects and CPU tensors; None for one process.
    """

    rank: int
    size: int
    device: torch.device
    lockstep: bool = False
    group: Any = None

    def barrier(self) -> None:
        """Wait until all ranks have called it."""
        if self.size > 1:
            torch.distributed.barrier(group=self.group)

    def total(self, tensor: torch.Tensor) -> torch.Tensor:
        """Sum a CPU tensor over the ranks, in place."""
        if self.size > 1:
            torch.distributed.all_reduce(tensor, group=self.group)
        return tensor

    def sum(self, value: int) -> int:
        """Sum of an integer over the ranks, returned on all of them."""
        return int(self.total(torch.tensor(value, dtype=torch.int64)))


def gather(local: list, world: World) -> list | None:
    """The lists of all ranks joined, on rank 0; None on other ranks."""
    if world.size == 1:
        return local
    parts: list | None = [None] * world.size if world.rank == 0 else None
    torch.distributed.gather_object(local, parts, dst=0, group=world.group)
    return [entry for part in parts for entry in part] if parts is not None else None


def gather_everywhere(local: list, world: World) -> list:
    """The lists of all ranks joined, on every rank."""
    if world.size == 1:
        return local
    parts: list = [None] * world.size
    torch.distributed.all_gather_object(parts, local, group=world.group)
    return [entry for part in parts for entry in part]


def current_world() -> World:
    """The world of this process: the workers of a Ray Train run, or the process alone."""
    if not torch.distributed.is_initialized():
        return World(0, 1, torch.device("cuda" if torch.cuda.is_available() else "cpu"))
    import ray.train.torch  # slow

    return World(
        rank=torch.distributed.get_rank(),
        size=torch.distributed.get_world_size(),
        device=ray.train.torch.get_device(),
        group=torch.distributed.new_group(backend="gloo"),  # for Python objects, also if tensors use NCCL
    )
