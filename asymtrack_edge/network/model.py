"""AsymTrack: the complete network of encoder, modulation, enhancement, attention and head."""

from __future__ import annotations

from typing import Dict, List, NamedTuple, Tuple

import torch
from torch import Tensor, nn

from asymtrack_edge.network import layers
from asymtrack_edge.variants import Variant

#: Names and tensors of ``Variant.state_shapes``, each with a leading batch axis.
TemplateState = Dict[str, Tensor]


class Prediction(NamedTuple):
    """The output of the search stream."""

    corners: Tensor  #: ``(B, 4)`` x1, y1, x2, y2 in crop units (0..1)
    score_tl: Tensor  #: ``(B, H, W)`` top-left score map before softmax
    score_br: Tensor  #: the same for the bottom-right corner

    @classmethod
    def of(cls, maps: Tuple[Tensor, Tensor]) -> Prediction:
        """Computes the corners from their score maps."""
        return cls(torch.cat([layers.soft_argmax(scores) for scores in maps], -1), *maps)

    @property
    def box(self) -> Tensor:
        """``(B, 4)`` cx, cy, w, h in crop units."""
        low, high = self.corners[..., :2], self.corners[..., 2:]
        return torch.cat([(low + high) / 2, high - low], -1)


class Stage(nn.Module):
    """Encoder blocks; then ETM, OPE and attention, where the variant has them; then downsampling.

    The blocks share one module list, because the names in the published checkpoints require it.
    """

    def __init__(self, variant: Variant, stage: int) -> None:
        super().__init__()
        self.stage = stage
        width, outputs = variant.widths[stage - 1 : stage + 1]
        blocks: List[nn.Module] = [layers.EncoderBlock(width, (1, 6)[i % 2]) for i in range(variant.depths[stage - 1])]
        if stage in variant.etm_stages:
            blocks.append(layers.TemplateModulation(width))
        if stage in variant.ope_stages:
            blocks.append(layers.PerceptionEnhancement(width))
        if stage == 3:
            blocks.append(layers.AttentionBlock(width, variant.attention_heads, variant.attention_head_dim))
        self.blocks = nn.ModuleList(blocks)
        self.downsample = layers.PatchEmbed(width, outputs, 3, 2)

    def template(self, z: Tensor) -> Tuple[Tensor, TemplateState]:
        """Maps template features ``(B, H, W, C)`` to those of the next stage; also returns this stage's state.

        The stage with attention returns the features that attention reads, because no later stage needs them.
        """
        state: TemplateState = {}
        for block in self.blocks:
            if isinstance(block, layers.TemplateModulation):
                state.update({f"etm{self.stage}_{k}": v for k, v in block.template(z).items()})
            elif isinstance(block, layers.AttentionBlock):
                state.update(block.template(z))
                return z, state
            else:
                z = block(z)
        return self.downsample(z), state

    def forward(self, x: Tensor, state: TemplateState) -> Tensor:
        """Search features ``(B, H, W, C)`` after the blocks; ``downsample`` maps them to the next stage."""
        for block in self.blocks:
            if isinstance(block, layers.TemplateModulation):
                x = block(x, state[f"etm{self.stage}_taps"], state[f"etm{self.stage}_pointwise"])
            elif isinstance(block, layers.AttentionBlock):
                x = block(x, state["keys"], state["values"])
            else:
                x = block(x)
        return x


class Backbone(nn.Module):
    """Stem and the three stages."""

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.patch_embed = layers.PatchEmbed(3, variant.widths[0], 7, 4)
        self.layers = nn.ModuleList([Stage(variant, stage) for stage in (1, 2, 3)])


class AsymTrack(nn.Module):
    """The tracker's network in training form, with parameters named as in the authors' checkpoints.

    It keeps no state between calls and, in eval mode, processes every item of a batch independently.
    """

    def __init__(self, variant: Variant) -> None:
        super().__init__()
        self.variant = variant
        self.backbone = Backbone(variant)
        self.bottleneck = nn.Linear(variant.widths[-1], variant.widths[-1])
        self.box_head = layers.CornerHead(variant.widths[-1])

    def template(self, image: Tensor) -> TemplateState:
        """Template branch, run once per target, on normalised RGB crops ``(B, 3, template_size, template_size)``."""
        return self.template_and_features(image)[0]

    def template_and_features(self, image: Tensor) -> Tuple[TemplateState, Tensor]:
        """Like ``template``; also returns the features ``(B, Z / 16, Z / 16, C)`` of stage 3 that attention reads."""
        z: Tensor = self.backbone.patch_embed(image.permute(0, 2, 3, 1))
        state: TemplateState = {}
        for layer in self.backbone.layers:
            z, part = layer.template(z)  # type: ignore[operator]
            state.update(part)
        return {name: state[name] for name in self.variant.state_shapes}, z

    def search(self, image: Tensor, state: TemplateState) -> Prediction:
        """Search branch, run per frame, on crops ``(B, 3, search_size, search_size)`` and the template state."""
        return Prediction.of(self.score_maps(image, state)[0])

    def score_maps(self, image: Tensor, state: TemplateState) -> Tuple[Tuple[Tensor, Tensor], Tensor]:
        """The score maps of ``search``, and the features ``(B, X / 16, X / 16, C)`` of stage 3 after attention."""
        x: Tensor = self.backbone.patch_embed(image.permute(0, 2, 3, 1))
        for layer in self.backbone.layers:
            features: Tensor = layer(x, state)
            x = layer.downsample(features)  # type: ignore[operator]
        return self.box_head(self.bottleneck(x)), features

    def forward(self, template: Tensor, search: Tensor) -> Prediction:
        """Both branches, for training: see ``template`` and ``search`` for the shapes."""
        return self.search(search, self.template(template))
