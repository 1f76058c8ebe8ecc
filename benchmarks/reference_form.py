"""The form in which AsymTrack is published and timed, as the yardstick for speed.

It answers as ``AsymTrack`` does, from the same weights, but spends what the published search step
spends on every frame: ETM forms its kernels anew from the template's prototypes, item by item of the
batch; attention, projection and MLP run over search and template tokens and give all outputs; batch
normalisation, ``gamma_1`` and the query scale are steps of their own. The template's features are
kept from the first frame, and OPE is one convolution, because the authors fold it when they time.
"""

from __future__ import annotations

from typing import Callable, List, NamedTuple

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
    """What is kept of the template: ``P_z`` of each ETM (paper, eq. 4), and the tokens that attention reads."""

    prototypes: List[Tensor]  # (B, N, C)
    tokens: List[Tensor]  # one (B, L, C)


class ReferenceForm(nn.Module):
    """A trained model in the form its authors publish; the weights are shared, not copied."""

    def __init__(self, model: AsymTrack) -> None:
        super().__init__()
        self.model = model
        # OPE with its six convolutions (paper, eq. 8) folded into one.
        enhancements = (block for block in model.modules() if isinstance(block, PerceptionEnhancement))
        self.kernels = {block: block.folded_kernel().detach() for block in enhancements}

    def template(self, image: Tensor) -> TemplateFeatures:
        """Template branch of normalised RGB crops ``(B, 3, template_size, template_size)``."""
        found = TemplateFeatures([], [])

        def keep_prototypes(block: TemplateModulation, z: Tensor) -> Tensor:
            tokens = z.flatten(1, 2)
            found.prototypes.append(block.pre_kernels(tokens).transpose(1, 2) @ tokens)
            return z

        def keep_tokens(block: AttentionBlock, z: Tensor) -> Tensor:
            found.tokens.append(z.flatten(1, 2))
            return z

        self._walk(image, keep_prototypes, keep_tokens)
        return found

    def forward(self, image: Tensor, template: TemplateFeatures) -> Prediction:
        """Search step of normalised RGB crops ``(B, 3, search_size, search_size)``."""
        prototypes, tokens = iter(template.prototypes), iter(template.tokens)
        x = self._walk(image, lambda b, x: _modulate(b, x, next(prototypes)), lambda b, x: _attend(b, x, next(tokens)))
        score_tl, score_br = self.model.box_head(self.model.bottleneck(x))
        corners = torch.cat([soft_argmax(score_tl), soft_argmax(score_br)], -1)
        return Prediction(corners, score_tl, score_br)

    def _walk(self, image: Tensor, modulate: Callable[..., Tensor], attend: Callable[..., Tensor]) -> Tensor:
        x = self.model.backbone.patch_embed(image.permute(0, 2, 3, 1))
        for layer in self.model.backbone.layers:
            for block in layer.blocks:  # type: ignore[union-attr]
                if isinstance(block, TemplateModulation):
                    x = modulate(block, x)
                elif isinstance(block, AttentionBlock):
                    x = attend(block, x)
                elif isinstance(block, PerceptionEnhancement):
                    y = F.conv2d(x.permute(0, 3, 1, 2), self.kernels[block], padding=1).permute(0, 2, 3, 1)
                    x = x + block.ibe_scale * F.relu(block.ln(y))
                else:
                    x = block(x)
            x = layer.downsample(x)  # type: ignore[operator,union-attr]
        return x


def _modulate(block: TemplateModulation, x: Tensor, template: Tensor) -> Tensor:
    """ETM on ``(B, H, W, C)`` with template prototypes ``(B, N, C)``, an item of the batch at a time."""
    tokens = x.flatten(1, 2)
    selection = block.pre_kernels_x(tokens)
    prototypes = selection.transpose(1, 2) @ tokens
    mixed = torch.stack([_filter(block.conv_att, p, z) for p, z in zip(prototypes, template)])
    weights = (block.proj_Cto1(mixed) * mixed).sum(1, keepdim=True).sigmoid()
    return x + F.relu(block.ln(selection @ mixed * weights)).view_as(x)


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
