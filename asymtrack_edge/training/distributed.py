"""Training in several processes started by ``torchrun``, or in a single one."""

from __future__ import annotations

import os
from contextlib import contextmanager
from dataclasses import dataclass, field
from datetime import timedelta
from typing import Any, Dict, Iterator, List

import torch
from torch import Tensor, distributed, nn

from asymtrack_edge.errors import UsageError


@dataclass(frozen=True)
class World:
    """The processes of a run; by default one process on a CPU."""

    rank: int = 0  #: number of this process
    size: int = 1  #: number of processes
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))  #: this process's device

    @property
    def is_main(self) -> bool:
        """Whether this process writes files and reports."""
        return self.rank == 0

    def wrap(self, network: nn.Module) -> nn.Module:
        """Averages gradients and normalisation statistics over all processes, as if one process had the whole batch."""
        if self.size == 1:
            return network
        for module in network.modules():
            if type(module) is nn.BatchNorm2d:
                module.__class__ = SharedBatchNorm
        ids = [self.device.index] if self.device.type == "cuda" else None
        return nn.parallel.DistributedDataParallel(network, device_ids=ids)

    def average(self, value: Tensor) -> Tensor:
        """The mean of a number over all processes."""
        return value if self.size == 1 else _Average.apply(value.detach())

    def agree(self, *values: float) -> List[float]:
        """The largest of each value over all processes, so that all make the same decision."""
        if self.size == 1:
            return list(values)
        tensor = torch.tensor(values, dtype=torch.float64, device=self.device)
        distributed.all_reduce(tensor, distributed.ReduceOp.MAX)
        return tensor.tolist()

    def wait(self) -> None:
        """Returns when all processes have reached this point."""
        if self.size > 1:
            distributed.barrier()


class _Average(torch.autograd.Function):
    """The mean of a tensor over all processes; the backward pass averages the gradient."""

    @staticmethod
    def forward(_: Any, value: Tensor) -> Tensor:
        value = value.clone()
        distributed.all_reduce(value)
        return value / distributed.get_world_size()

    @staticmethod
    def backward(_: Any, gradient: Tensor) -> Tensor:
        return _Average.apply(gradient)


class SharedBatchNorm(nn.BatchNorm2d):
    """Batch normalisation with the statistics of all processes; PyTorch's own runs on GPUs only."""

    def forward(self, x: Tensor) -> Tensor:
        if not self.training:
            return super().forward(x)
        wide = x.float()
        sums = torch.stack([wide.mean((0, 2, 3)), wide.square().mean((0, 2, 3))])
        mean, square = _Average.apply(sums).unbind()
        variance = (square - mean.square()).clamp(min=0)
        with torch.no_grad():
            count = x.numel() // x.shape[1] * distributed.get_world_size()
            running: Dict[str, Tensor] = dict(self.named_buffers())
            running["running_mean"].lerp_(mean, self.momentum or 0.1)
            running["running_var"].lerp_(variance * count / (count - 1), self.momentum or 0.1)
            running["num_batches_tracked"] += 1
        scale = self.weight * torch.rsqrt(variance + self.eps)
        shift = self.bias - mean * scale
        return (wide * scale[:, None, None] + shift[:, None, None]).to(x.dtype)


@contextmanager
def join_world(device: str) -> Iterator[World]:
    """Joins the processes that ``torchrun`` started, each on its own GPU or all on the CPU.

    ``device`` is ``"auto"`` (a GPU, or the CPU where there is none), ``"cpu"``, ``"cuda"`` or ``"cuda:N"``. Raises
    ``UsageError`` if PyTorch has no such device.
    """
    size = int(os.environ.get("WORLD_SIZE", "1"))
    if device == "auto":
        device = "cuda" if torch.cuda.is_available() else "cpu"
    if size > 1 and device != "cpu":
        device = f"cuda:{os.environ.get('LOCAL_RANK', '0')}"
    chosen = torch.device(device)
    if chosen.type == "cuda" and (chosen.index or 0) >= torch.cuda.device_count():
        raise UsageError(f"PyTorch sees no device {device!r}: use --device cpu, or install a PyTorch with CUDA")
    if size == 1:
        yield World(0, 1, chosen)
        return
    if chosen.type == "cuda":
        torch.cuda.set_device(chosen)
    # The timeout is long because the others wait while the main process labels videos.
    distributed.init_process_group("nccl" if chosen.type == "cuda" else "gloo", timeout=timedelta(hours=12))
    try:
        yield World(distributed.get_rank(), size, chosen)
    finally:
        distributed.destroy_process_group()
