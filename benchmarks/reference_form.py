"""The form in which AsymTrack is published and timed, as the yardstick for speed.

It answers as ``AsymTrack`` does, from the same weights, but spends what the published search step
spends on every frame: ETM forms its kernels anew from the template's prototypes, item by item of the
batch; attention, projection and MLP run over search and template tokens and give all outputs; batch
normalisation, ``gamma_1`` and the query scale are steps of their own. The template's features are
kept from the first frame, and OPE is one convolution, because the authors fold it when they time.
"""

from __future__ import annotations

from typing import List, NamedTuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.network import AsymTrack, Prediction
from asymtrack_edge.network.layers import (
    AttentionBlock,
    DynamicConv,
    PerceptionEnhancement,
    TemplateModulation,
    soft_argmax,
)


class TemplateFeatures(NamedTuple):
    """What is kept of the template: ``P_z`` of each ETM, ``(B, N, C)`` (paper, eq. 4), and its tokens ``(B, L, C)``."""

    prototypes: List[Tensor]
    tokens: Tensor


class ReferenceEnhancement(nn.Module):
    """OPE with its six convolutions (paper, eq. 8) folded into one."""

    def __init__(self, block: PerceptionEnhancement) -> None:
        super().__init__()
        self.block = block
        self.kernel = block.folded_kernel().detach()

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        y = F.conv2d(x.permute(0, 3, 1, 2), self.kernel, padding=1).permute(0, 2, 3, 1)
        return x + self.block.ibe_scale * F.relu(self.block.ln(y))


class ReferenceForm(nn.Module):
    """A trained model in the form its authors publish; the weights are shared, not copied."""

    def __init__(self, model: AsymTrack) -> None:
        super().__init__()
        self.model = model
        self.enhancements = nn.ModuleDict()
        for stage in model.variant.ope_stages:
            for block in model.backbone.layers[stage - 1].blocks:  # type: ignore[union-attr]
                if isinstance(block, PerceptionEnhancement):
                    self.enhancements[str(stage)] = ReferenceEnhancement(block)

    def template(self, image: Tensor) -> TemplateFeatures:
        """Template branch of normalised RGB crops ``(B, 3, template_size, template_size)``."""
        z = self.model.backbone.patch_embed(image.permute(0, 2, 3, 1))
        prototypes: List[Tensor] = []
        for stage, layer in enumerate(self.model.backbone.layers, 1):
            for block in layer.blocks:  # type: ignore[union-attr]
                if isinstance(block, TemplateModulation):
                    tokens = z.flatten(1, 2)
                    prototypes.append(block.pre_kernels(tokens).transpose(1, 2) @ tokens)
                elif isinstance(block, PerceptionEnhancement):
                    z = self.enhancements[str(stage)](z)
                elif isinstance(block, AttentionBlock):
                    return TemplateFeatures(prototypes, z.flatten(1, 2))
                else:
                    z = block(z)
            z = layer.downsample(z)  # type: ignore[operator,union-attr]
        raise AssertionError("an AsymTrack ends in an attention block")

    def forward(self, image: Tensor, template: TemplateFeatures) -> Prediction:
        """Search step of normalised RGB crops ``(B, 3, search_size, search_size)``."""
        x = self.model.backbone.patch_embed(image.permute(0, 2, 3, 1))
        prototypes = iter(template.prototypes)
        for stage, layer in enumerate(self.model.backbone.layers, 1):
            for block in layer.blocks:  # type: ignore[union-attr]
                if isinstance(block, TemplateModulation):
                    x = _modulate(block, x, next(prototypes))
                elif isinstance(block, PerceptionEnhancement):
                    x = self.enhancements[str(stage)](x)
                elif isinstance(block, AttentionBlock):
                    x = _attend(block, x, template.tokens)
                else:
                    x = block(x)
            x = layer.downsample(x)  # type: ignore[operator,union-attr]
        score_tl, score_br = self.model.box_head(self.model.bottleneck(x))
        corners = torch.cat([soft_argmax(score_tl), soft_argmax(score_br)], -1)
        return Prediction(corners, score_tl, score_br)


def _modulate(block: TemplateModulation, x: Tensor, template: Tensor) -> Tensor:
    """ETM on ``(B, H, W, C)`` with template prototypes ``(B, N, C)``, an item of the batch at a time."""
    tokens = x.flatten(1, 2)
    selection = block.pre_kernels_x(tokens)
    prototypes = selection.transpose(1, 2) @ tokens
    if isinstance(block.conv_att, DynamicConv):
        mixed = torch.stack([_filter(block.conv_att, p, z) for p, z in zip(prototypes, template)])
    else:
        mixed = block.conv_att(prototypes, {"prototypes": template})
    modulated = selection @ mixed
    if block.proj_Cto1 is not None:
        modulated = modulated * (block.proj_Cto1(mixed) * mixed).sum(1, keepdim=True).sigmoid()
    return x + F.relu(block.ln(modulated)).view_as(x)


def _filter(conv: DynamicConv, prototypes: Tensor, template: Tensor) -> Tensor:
    """Dynamic separable convolution (eq. 6) of one item's prototypes ``(N, C)``."""
    count = len(prototypes)
    weights = conv.weight_linear(template)
    taps, pointwise = weights[:, :3].unsqueeze(1), weights[:, 3:].unsqueeze(2)
    filtered = F.relu(F.conv1d(prototypes.unsqueeze(0), taps, padding=1, groups=count))
    return conv.norm(F.conv1d(filtered, pointwise)[0])


def _attend(block: AttentionBlock, x: Tensor, template: Tensor) -> Tensor:
    """The attention block over search and template tokens, all of whose outputs are computed."""
    attention = block.attn
    tokens = torch.cat([x.flatten(1, 2), template], 1)
    q, k, v = attention.split_heads(attention.qkv(block.norm1(tokens)), 3).unbind(0)
    weights = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
    tokens = tokens + attention.proj((weights @ v).transpose(1, 2).flatten(2))
    tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens[:, : x.shape[1] * x.shape[2]].reshape(x.shape)
