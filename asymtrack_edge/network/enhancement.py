"""Object perception enhancement (OPE; paper, eq. 8 and "Re-parameterization Inference")."""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class PerceptionEnhancement(nn.Module):
    """Parallel 3x3 convolutions, each with a gradient ("local descriptor") twin.

    The branches are linear in their kernels, so even in training one convolution with the folded
    kernel gives the same result and gradients as the six the paper draws.
    """

    def __init__(self, width: int, branches: int = 3) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))
        self.ibe_scale = nn.Parameter(torch.full((width,), 0.5))
        self.rbr_conv = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(branches)])
        self.ln = nn.LayerNorm(width)

    def folded_kernel(self) -> Tensor:
        """The one kernel ``(C, C, 3, 3)`` equivalent to all branches (eq. 8, summed)."""
        kernel = torch.stack([conv.weight for conv in self.rbr_conv]).sum(0)  # type: ignore[misc]
        gradient = torch.sigmoid(self.theta) * kernel.sum((2, 3), keepdim=True)
        return kernel - F.pad(gradient, (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        y = F.conv2d(x.permute(0, 3, 1, 2), self.folded_kernel(), padding=1).permute(0, 2, 3, 1)
        return x + self.ibe_scale * F.relu(self.ln(y))
