"""Efficient template modulation (ETM; paper, eqs. 4-7 and Table 5a).

The template is reduced to a few prototypes, and those to the kernels of a dynamic separable 1-D
convolution. The kernels are all the search stream ever needs, so they belong to the template state.
The paper writes the kernel as conditioned on the search prototypes; the published model conditions
it on the template's, which is what makes it computable once. This follows the published model.
"""

from __future__ import annotations

from typing import Dict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


class DynamicConv(nn.Module):
    """Separable 1-D convolution over prototypes, its kernel generated from the template (eq. 6)."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight_linear = nn.Linear(width, 3 + prototypes)
        self.norm = nn.LayerNorm(width)

    def kernels(self, prototypes: Tensor) -> Dict[str, Tensor]:
        """From template prototypes ``(B, N, C)``: ``taps (B, N, 3)`` and ``pointwise (B, N, N)``."""
        weights = self.weight_linear(prototypes)
        return {"taps": weights[..., :3], "pointwise": weights[..., 3:]}

    def forward(self, prototypes: Tensor, kernels: Dict[str, Tensor]) -> Tensor:
        """Filters search prototypes ``(B, N, C)`` along the channels, then mixes them."""
        taps = kernels["taps"]
        width = prototypes.shape[-1]
        padded = F.pad(prototypes, (1, 1))
        mixed = padded[..., 0:width] * taps[..., 0:1]
        mixed = mixed + padded[..., 1 : width + 1] * taps[..., 1:2]
        mixed = mixed + padded[..., 2 : width + 2] * taps[..., 2:3]
        return self.norm(kernels["pointwise"] @ F.relu(mixed))


class CrossAttention(nn.Module):
    """Multi-head cross-attention from search to template prototypes, for the ablation of Table 5a."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.attention = nn.MultiheadAttention(width, width // 16, batch_first=True)
        self.norm = nn.LayerNorm(width)

    def kernels(self, prototypes: Tensor) -> Dict[str, Tensor]:
        """The template prototypes ``(B, N, C)`` themselves."""
        return {"prototypes": prototypes}

    def forward(self, prototypes: Tensor, kernels: Dict[str, Tensor]) -> Tensor:
        """Attends from search prototypes ``(B, N, C)`` to the template's."""
        template = kernels["prototypes"]
        mixed, _ = self.attention(prototypes, template, template, need_weights=False)
        return self.norm(prototypes + mixed)


class TemplateModulation(nn.Module):
    """ETM of one stage.

    Args:
        width: channels C of the stage; there are C / 32 prototypes.
        interaction: ``"dtm"`` or ``"mhca"``, see ``Variant.etm_interaction``.
        prototype_attention: see ``Variant.prototype_attention``.
    """

    def __init__(self, width: int, interaction: str = "dtm", prototype_attention: bool = True) -> None:
        super().__init__()
        prototypes = width // 32
        self.pre_kernels = nn.Linear(width, prototypes)
        self.pre_kernels_x = nn.Linear(width, prototypes)
        self.proj_Cto1 = nn.Linear(width, 1) if prototype_attention else None
        self.ln = nn.LayerNorm(width)
        self.conv_att = (DynamicConv if interaction == "dtm" else CrossAttention)(width, prototypes)

    def template(self, z: Tensor) -> Dict[str, Tensor]:
        """Reduces template features ``(B, H, W, C)`` to this stage's part of the template state."""
        tokens = z.flatten(1, 2)
        return self.conv_att.kernels(_contract(self.pre_kernels(tokens), tokens))

    def forward(self, x: Tensor, kernels: Dict[str, Tensor]) -> Tensor:
        """Modulates search features ``(B, H, W, C)``; the shape stays."""
        tokens = x.flatten(1, 2)
        selection = self.pre_kernels_x(tokens)  # S_x, (B, HW, N)
        mixed = self.conv_att(_contract(selection, tokens), kernels)  # P_mix, (B, N, C)
        if self.proj_Cto1 is not None:
            # The attention weighs channels, so it can be applied to the N prototypes instead of to
            # all HW positions (eq. 7, reassociated).
            attention = (self.proj_Cto1(mixed) * mixed).sum(1, keepdim=True).sigmoid()
            mixed = mixed * attention
        return x + F.relu(self.ln(selection @ mixed.to(selection.dtype))).view_as(x)


def _contract(selection: Tensor, tokens: Tensor) -> Tensor:
    """Sums tokens ``(B, HW, C)`` into prototypes ``(B, N, C)`` (eq. 4), in fp32 or better.

    A sum over all positions leaves the range of fp16; the LayerNorm that follows brings it back.
    """
    dtype = torch.promote_types(selection.dtype, torch.float32)
    return selection.to(dtype).transpose(1, 2) @ tokens.to(dtype)
