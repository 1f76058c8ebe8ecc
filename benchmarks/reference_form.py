"""The reference form: AsymTrack as its authors publish and time it, the baseline for speed.

It has the weights of ``AsymTrack`` and gives the same predictions, but on every frame it does all the work
of the published search step. ETM recomputes its kernels from the template's prototypes, for each item of the
batch; attention, projection and MLP run over search and template tokens and compute all outputs; batch
normalisation, ``gamma_1`` and the query scale are separate steps. The template's features are
kept from the first frame, and OPE is one convolution, because the authors fold it before they time.
"""

from __future__ import annotations

from typing import Callable, List, Union

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.network import AsymTrack, Prediction
from asymtrack_edge.network.layers import AttentionBlock, PerceptionEnhancement, TemplateModulation

#: Blocks in which the search branch uses the template.
Interaction = Union[TemplateModulation, AttentionBlock]


class ReferenceForm(nn.Module):
    """A trained model in the form that its authors publish; it shares the model's weights."""

    def __init__(self, model: AsymTrack) -> None:
        super().__init__()
        self.model = model
        # OPE with its six convolutions (paper, eq. 8) folded into one.
        enhancements = (block for block in model.modules() if isinstance(block, PerceptionEnhancement))
        self.kernels = {block: block.folded_kernel().detach() for block in enhancements}

    def template(self, image: Tensor) -> List[Tensor]:
        """What the search step needs from template crops: normalised RGB, ``(B, 3, template_size, template_size)``.

        In the order of the blocks: ``P_z (B, N, C)`` of each ETM (paper, eq. 4), the tokens ``(B, L, C)`` of attention.
        """
        kept: List[Tensor] = []

        def keep(block: Interaction, z: Tensor) -> Tensor:
            tokens = z.flatten(1, 2)
            if isinstance(block, TemplateModulation):
                tokens = block.pre_kernels(tokens).transpose(1, 2) @ tokens
            kept.append(tokens)
            return z

        self._walk(image, keep)
        return kept

    def forward(self, image: Tensor, template: List[Tensor]) -> Prediction:
        """Search step on normalised RGB crops ``(B, 3, search_size, search_size)``."""
        kept = iter(template)

        def use_template(block: Interaction, x: Tensor) -> Tensor:
            if isinstance(block, TemplateModulation):
                return _modulate(block, x, next(kept))
            return _attend(block, x, next(kept))

        x = self._walk(image, use_template)
        return Prediction.of(self.model.box_head(self.model.bottleneck(x)))

    def _walk(self, image: Tensor, interact: Callable[[Interaction, Tensor], Tensor]) -> Tensor:
        """The features after all stages; ``interact`` is called in place of each ``Interaction`` block."""
        x = self.model.backbone.patch_embed(image.permute(0, 2, 3, 1))
        for layer in self.model.backbone.layers:
            for block in layer.blocks:  # type: ignore[union-attr]
                if isinstance(block, (TemplateModulation, AttentionBlock)):
                    x = interact(block, x)
                elif isinstance(block, PerceptionEnhancement):
                    y = F.conv2d(x.permute(0, 3, 1, 2), self.kernels[block], padding=1).permute(0, 2, 3, 1)
                    x = x + block.ibe_scale * F.relu(block.ln(y))
                else:
                    x = block(x)
            x = layer.downsample(x)  # type: ignore[operator,union-attr]
        return x


def _modulate(block: TemplateModulation, x: Tensor, template: Tensor) -> Tensor:
    """ETM on ``(B, H, W, C)`` with template prototypes ``(B, N, C)``, one item of the batch at a time."""
    tokens = x.flatten(1, 2)
    selection = block.pre_kernels_x(tokens)
    prototypes = selection.transpose(1, 2) @ tokens
    filtered = []
    for item, z in zip(prototypes, template):  # the dynamic separable convolution, eq. 6
        kernels = block.conv_att.weight_linear(z)
        taps, pointwise = kernels[:, :3].unsqueeze(1), kernels[:, 3:].unsqueeze(2)
        depthwise = F.relu(F.conv1d(item.unsqueeze(0), taps, padding=1, groups=len(item)))
        filtered.append(block.conv_att.norm(F.conv1d(depthwise, pointwise)[0]))
    mixed = torch.stack(filtered)
    weights = (block.proj_Cto1(mixed) * mixed).sum(1, keepdim=True).sigmoid()
    return x + F.relu(block.ln(selection @ mixed * weights)).view_as(x)


def _attend(block: AttentionBlock, x: Tensor, template: Tensor) -> Tensor:
    """The attention block over search and template tokens; it computes the outputs of both."""
    attention = block.attn
    tokens = torch.cat([x.flatten(1, 2), template], 1)
    q, k, v = attention.split_heads(attention.qkv(block.norm1(tokens)), 3).unbind(0)
    weights = (q @ k.transpose(2, 3) * attention.head_dim**-0.5).softmax(-1)
    tokens = tokens + attention.proj((weights @ v).transpose(1, 2).flatten(2))
    tokens = tokens + block.mlp(block.norm2(tokens))
    return tokens[:, : x.shape[1] * x.shape[2]].reshape(x.shape)
