"""Batched square crops from canvases, on whatever device they live."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor
from torch.nn import functional as F


def inside_mask(sizes: Tensor, centre: Tensor, side: Tensor, size: int, flip: Tensor) -> Tensor:
    """Which pixels of ``crop`` with the same arguments show the picture: bool ``(B, 1, size, size)``.

    Args:
        sizes: ``(B, 2)`` width and height of each picture.
    """
    xs, ys = _positions(centre, side, size, flip)
    return (
        ((ys >= 0) & (ys < sizes[:, 1:]))[:, None, :, None] & ((xs >= 0) & (xs < sizes[:, :1]))[:, None, None, :]
    )


def _positions(centre: Tensor, side: Tensor, size: int, flip: Tensor) -> Tuple[Tensor, Tensor]:
    """Where the crop's columns and rows lie in the picture, each ``(B, size)``."""
    steps = (torch.arange(size, device=centre.device, dtype=torch.float32) + 0.5) / size - 0.5
    xs = centre[:, :1] + steps * side[:, None] * torch.where(flip, -1.0, 1.0)[:, None]
    return xs, centre[:, 1:] + steps * side[:, None]


def crop(canvases: Tensor, centre: Tensor, side: Tensor, size: int, flip: Tensor) -> Tensor:
    """Cuts and resizes one square region out of each canvas, bilinearly, zeros outside.

    The sampling positions are those of ``cv2.resize`` on a crop, which the tracker uses.

    Args:
        canvases: ``(B, C, H, W)`` uint8 or float.
        centre: ``(B, 2)`` x, y in pixels.
        side: ``(B,)`` in pixels.
        size: side of the output in pixels.
        flip: ``(B,)`` bool, mirrors the crop left to right.

    Returns:
        float32 ``(B, C, size, size)``, values as in ``canvases``, in channels-last memory.
    """
    height, width = canvases.shape[-2:]
    xs, ys = _positions(centre, side, size, flip)
    grid = torch.stack(
        [
            (2 * xs / width - 1)[:, None, :].expand(-1, size, -1),
            (2 * ys / height - 1)[:, :, None].expand(-1, -1, size),
        ],
        -1,
    )
    source = canvases.float().contiguous(memory_format=torch.channels_last)
    return F.grid_sample(source, grid, mode="bilinear", padding_mode="zeros", align_corners=False)
