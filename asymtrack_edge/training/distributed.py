"""One process of several, started by ``torchrun``; or the only one."""

from __future__ import annotations

import os
from dataclasses import dataclass
from datetime import timedelta
from typing import List

import torch
from torch import distributed, nn

from asymtrack_edge.errors import UsageError


@dataclass(frozen=True)
class World:
    """Who takes part.

    Attributes:
        rank: number of this process.
        size: how many there are.
        device: where this one computes.
    """

    rank: int
    size: int
    device: torch.device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, model: nn.Module) -> nn.Module:
        """Lets gradients be averaged over all processes."""
        if self.size == 1:
            return model
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(model, device_ids=ids)

    def agree(self, *values: float) -> List[float]:
        """The largest of each value over all processes, so that all take the same decision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Returns when all processes have come this far."""
        if self.size > 1:
            distributed.barrier()

    def leave(self) -> None:
        """Ends taking part."""
        if self.size > 1 and distributed.is_initialized():
            distributed.destroy_process_group()


def pick_device(name: str) -> torch.device:
    """The device called ``name``; ``"auto"`` is the first GPU, or the CPU where there is none.

    Raises:
        UsageError: PyTorch does not know or has no such device.
    """
    if name == "auto":
        name = "cuda" if torch.cuda.is_available() else "cpu"
    try:
        device = torch.device(name)
    except RuntimeError:
        raise UsageError(f"unknown device {name!r}: use auto, cpu, cuda or cuda:N") from None
    if device.type == "cuda" and (device.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"PyTorch sees no device {name!r}: use --device cpu, or install a PyTorch with CUDA")
    return device


def join_world(device: str = "auto") -> World:
    """Joins the processes ``torchrun`` has started, each on a GPU of its own or all on the CPU.

    Raises:
        UsageError: there is no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if size == 1:
        return World(0, 1, pick_device(device))
    local = int(os.environ.get("LOCAL_RANK", "0"))
    chosen = pick_device(device)
    if chosen.type == "cuda":
        chosen = pick_device(f"cuda:{local}")
        torch.cuda.set_device(chosen)
    # The others wait while the main process labels videos or distils.
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    return World(distributed.get_rank(), size, chosen)
