"""Random numbers that depend on nothing but the seed, the process and the step.

Each batch starts its own stream. A run that stopped after any step therefore goes on with exactly
the pairs it would have seen, nothing has to be saved for it, and loaders may prepare batches ahead.
"""

from __future__ import annotations

import numpy as np
import torch
from torch import Tensor


class Random:
    """A stream of random numbers on one device.

    Args:
        device: where the numbers are made.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device)

    def start(self, *key: int) -> None:
        """Begins the stream that belongs to ``key``, non-negative integers such as seed, rank, step."""
        seed = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
        self.generator.manual_seed(int(seed) >> 1)

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in 0..1."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Float32, standard normal."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, count: int, below: int) -> Tensor:
        """int64 ``(count,)`` in ``0 .. below - 1``."""
        return torch.randint(below, (count,), generator=self.generator, device=self.device)

    def choose(self, weight: Tensor, count: int) -> Tensor:
        """int64 ``(count,)`` indices drawn in proportion to ``weight``, with repetition."""
        # torch.multinomial takes no more than 2^24 weights; a cumulative sum takes any number.
        edges = weight.double().cumsum(0)
        at = torch.rand(count, generator=self.generator, device=self.device, dtype=torch.float64) * edges[-1]
        return torch.searchsorted(edges, at, right=True).clamp(max=len(weight) - 1)
