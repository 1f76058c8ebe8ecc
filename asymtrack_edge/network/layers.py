"""Encoder layers: patch embedding, EfficientMod block, downsampling.

Features are channels-last, ``(batch, height, width, channels)``, as in the published model. A
convolution sees them through a permuted view, which PyTorch treats as its ``channels_last`` memory
format: no copy is made.
"""

from __future__ import annotations

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_channels_last(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Applies ``conv`` to a ``(B, H, W, C)`` tensor."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: the stem (7x7, stride 4) and the downsampling (3x3, stride 2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm = nn.LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, inputs)`` to ``(B, H / stride, W / stride, outputs)``."""
        return self.norm(conv_channels_last(self.proj, x))


class ContextLayer(nn.Module):
    """FC, GELU'd 7x7 depthwise convolution, FC: the context that modulates a block's features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.g = nn.Linear(width, width)
        self.context_list = nn.ModuleList([nn.Conv2d(width, width, 7, padding=3, groups=width)])

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        return self.g(F.gelu(conv_channels_last(self.context_list[0], self.f(x))))  # type: ignore[arg-type]


class ContextMlp(nn.Module):
    """Multiplies projected features by their context and projects back.

    Args:
        width: channels in and out.
        ratio: expansion of the hidden features. With a ratio above 1 the hidden features go through
            GELU and channel ``j`` is multiplied by context channel ``j mod width``.
    """

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.fc1 = nn.Linear(width, width * ratio)
        self.context_layer = ContextLayer(width)
        self.fc2 = nn.Linear(width * ratio, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        context = self.context_layer(x)
        hidden = self.fc1(x)
        if self.ratio > 1:
            hidden = F.gelu(hidden).unflatten(-1, (self.ratio, -1)) * context.unsqueeze(-2)
            return self.fc2(hidden.flatten(-2))
        return self.fc2(hidden * context)


class EncoderBlock(nn.Module):
    """EfficientMod block: ``x + gamma_1 * mlp(norm(x))`` (paper, "Lightweight Backbone")."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.gamma_1 = nn.Parameter(torch.full((width,), 0.5))
        self.norm = nn.LayerNorm(width)
        self.mlp = ContextMlp(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        return x + self.gamma_1 * self.mlp(self.norm(x))
