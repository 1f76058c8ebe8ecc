"""Corner head: two convolutional towers, soft-argmax over their score maps."""

from __future__ import annotations

from typing import Tuple

import torch
from torch import Tensor, nn


class CornerHead(nn.Module):
    """Predicts the top-left and bottom-right corner maps (paper, "Box Prediction Head")."""

    WIDTHS = (256, 128, 64, 32)

    def __init__(self, inputs: int = 256) -> None:
        super().__init__()
        for corner in ("tl", "br"):
            width = inputs
            for i, outputs in enumerate(self.WIDTHS, 1):
                layer = nn.Sequential(nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
                setattr(self, f"conv{i}_{corner}", layer)
                width = outputs
            setattr(self, f"conv5_{corner}", nn.Conv2d(width, 1, 1))

    def tower(self, x: Tensor, corner: str) -> Tensor:
        """Score map ``(B, H, W)``, before softmax, of ``corner`` ``"tl"`` or ``"br"``."""
        for i in range(1, 6):
            x = getattr(self, f"conv{i}_{corner}")(x)
        return x[:, 0]

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Maps features ``(B, H, W, C)`` to the score maps ``(B, H, W)`` of both corners."""
        x = x.permute(0, 3, 1, 2)
        return self.tower(x, "tl"), self.tower(x, "br")


def soft_argmax(scores: Tensor) -> Tensor:
    """Expected position ``(B, 2)`` as (x, y) in crop units, of score maps ``(B, H, W)``.

    A cell's coordinate is its index over the side, so positions lie in ``[0, (side - 1) / side]``.
    """
    height, width = scores.shape[-2:]
    probability = scores.float().flatten(1).softmax(-1).unflatten(-1, (height, width))
    xs = torch.arange(width, device=scores.device, dtype=torch.float32) / width
    ys = torch.arange(height, device=scores.device, dtype=torch.float32) / height
    return torch.stack([(probability.sum(1) * xs).sum(-1), (probability.sum(2) * ys).sum(-1)], -1)


def corners_to_box(corners: Tensor) -> Tensor:
    """``(..., 4)`` as x1, y1, x2, y2 to cx, cy, w, h."""
    low, high = corners[..., :2], corners[..., 2:]
    return torch.cat([(low + high) / 2, high - low], -1)
