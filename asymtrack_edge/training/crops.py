"""Reproducible random numbers, and square crops as the tracker makes them, in batches.

A crop is a window of whole pixels, zeros where it leaves the picture, resized bilinearly. On a CPU
OpenCV cuts one after the other, which is several times faster than sampling the batch; elsewhere
the batch is sampled at once at the same positions.
"""

from __future__ import annotations

from typing import NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asymtrack_edge.geometry import Cropper, CropWindow


class Random:
    """A stream of random numbers on one device that depends on nothing but its key.

    Each batch starts its own stream, by seed, process and step. A run that stopped after any step goes
    on with exactly the pairs it would have seen, and loaders may prepare batches ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device)

    def start(self, *key: int) -> None:
        """Begins the stream that belongs to ``key``, non-negative integers."""
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
        return torch.multinomial(weight, count, replacement=True, generator=self.generator)

    def some(self, count: int, probability: float) -> Tensor:
        """Indices of those out of ``count`` that are chosen with ``probability`` each."""
        if probability <= 0:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        return (self.uniform(count) < probability).nonzero()[:, 0]


class Windows(NamedTuple):
    """Square windows, one per picture, in pixels of the picture."""

    corner: Tensor  #: float32 ``(B, 2)`` left and top, whole numbers
    side: Tensor  #: float32 ``(B,)``, whole numbers
    flip: Tensor  #: bool ``(B,)``, the crop is mirrored left to right


def windows_around(centre: Tensor, side: Tensor, flip: Tensor) -> Windows:
    """Windows of ``side`` pixels ``(B,)``, rounded up, around ``centre`` ``(B, 2)``; rounded as published."""
    side = side.ceil().clamp(min=1)
    return Windows((centre - side[:, None] / 2).round(), side, flip)


def inside(windows: Windows, sizes: Tensor, size: int) -> Tensor:
    """Which pixels of the crops show their pictures of ``sizes`` ``(B, 2)``: bool ``(B, 1, size, size)``."""
    xs, ys = _positions(windows, size)
    columns = (xs >= 0) & (xs < sizes[:, :1])
    rows = (ys >= 0) & (ys < sizes[:, 1:])
    return rows[:, None, :, None] & columns[:, None, None, :]


def cut(canvases: Tensor, index: Tensor, sizes: Tensor, windows: Windows, size: int) -> Tensor:
    """Cuts one window out of each chosen canvas and resizes it.

    Args:
        canvases: uint8 ``(N, H, W, C)``.
        index: int64 ``(B,)`` into ``canvases``.
        sizes: float32 ``(B, 2)`` width and height of the pictures on the chosen canvases.
        windows: ``B`` of them.
        size: side of the output in pixels.

    Returns:
        uint8 ``(B, C, size, size)`` in channels-last memory.
    """
    if canvases.device.type == "cpu" and canvases.shape[-1] == 3:
        out = np.empty((len(index), size, size, 3), np.uint8)
        pictures, cropper = canvases.numpy(), Cropper()
        for i, (n, (width, height)) in enumerate(zip(index.tolist(), sizes.long().tolist())):
            cut_one(pictures[n, :height, :width], windows, i, out[i], cropper)
        return torch.from_numpy(out).permute(0, 3, 1, 2)
    height, width = canvases.shape[1:3]
    xs, ys = _positions(windows, size)
    # Resizing a crop never looks beyond the crop's own pixels.
    last = windows.side[:, None] - 0.5
    xs = torch.minimum(torch.maximum(xs, windows.corner[:, :1] + 0.5), windows.corner[:, :1] + last)
    ys = torch.minimum(torch.maximum(ys, windows.corner[:, 1:] + 0.5), windows.corner[:, 1:] + last)
    columns = (2 * xs / width - 1)[:, None, :].expand(-1, size, -1)
    rows = (2 * ys / height - 1)[:, :, None].expand(-1, -1, size)
    grid = torch.stack([columns, rows], -1)
    source = canvases[index].permute(0, 3, 1, 2).float()
    return F.grid_sample(source, grid, padding_mode="zeros", align_corners=False).round().to(torch.uint8)


def _positions(windows: Windows, size: int) -> Tuple[Tensor, Tensor]:
    """Where the crop's columns and rows lie in the picture (pixel edges are whole numbers)."""
    steps = (torch.arange(size, device=windows.side.device, dtype=torch.float32) + 0.5) / size
    steps = steps.expand(len(windows.side), -1)
    across = torch.where(windows.flip[:, None], 1 - steps, steps)
    side = windows.side[:, None]
    return windows.corner[:, :1] + across * side, windows.corner[:, 1:] + steps * side


def cut_one(picture: np.ndarray, windows: Windows, i: int, out: np.ndarray, cropper: Cropper) -> None:
    """Cuts window ``i`` out of one picture ``(H, W, 3)`` into ``out`` ``(S, S, 3)``, both uint8."""
    left, top = (int(v) for v in windows.corner[i].tolist())
    side = int(windows.side[i].item())
    cropper.crop(picture, CropWindow(left, top, side, (left + side / 2, top + side / 2)), out)
    if windows.flip[i]:
        out[...] = out[:, ::-1].copy()
