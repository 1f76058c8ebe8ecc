"""Folding: merges linear operations that follow each other, without approximation.

* OPE: the parallel branches and their gradient twins become one 3x3 convolution (paper,
  "Re-parameterization Inference").
* Head: batch normalisation is folded into the convolutions.
* ETM: the three taps of the dynamic convolution become one matrix product.
* Encoder blocks: ``gamma_1`` is folded into ``fc2``; the affine part of the LayerNorm stays (it feeds two
  layers and costs nothing in a fused kernel).
* Attention: ``1 / sqrt(head_dim)`` is folded into the queries. The queries, keys and values of the search
  tokens stay one matrix; the template's keys and values get their own.
"""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn
from torch.nn import functional as F
from torch.nn.utils.fusion import fuse_conv_bn_eval

from asymtrack_edge.network import AsymTrack, layers


class FoldedEnhancement(layers.PerceptionEnhancement):
    """OPE with one convolution."""

    def __init__(self, block: layers.PerceptionEnhancement) -> None:
        nn.Module.__init__(self)
        self.kernel = nn.Parameter(block.folded_kernel())
        self.ln, self.ibe_scale = block.ln, block.ibe_scale
        if (block.ibe_scale >= 0).all():  # then it commutes with the ReLU
            self.ln.weight.mul_(block.ibe_scale)
            self.ln.bias.mul_(block.ibe_scale)
            self.ibe_scale = None

    def folded_kernel(self) -> Tensor:
        return self.kernel


class FoldedDynamicConv(layers.DynamicConv):
    """The dynamic convolution as one matrix product: the three neighbours of a channel are gathered at once."""

    neighbours: Tensor

    def __init__(self, layer: layers.DynamicConv) -> None:
        nn.Module.__init__(self)
        self.weight_linear, self.norm = layer.weight_linear, layer.norm
        self.register_buffer("neighbours", torch.arange(layer.weight_linear.in_features) + torch.arange(3)[:, None])

    def forward(self, prototypes: Tensor, taps: Tensor, pointwise: Tensor) -> Tensor:
        gathered = F.pad(prototypes, (1, 1), value=0.0)[..., self.neighbours]  # (B, N, 3, C)
        mixed = (taps.unsqueeze(-2) @ gathered).squeeze(-2)
        return self.norm(pointwise @ F.relu(mixed))


class FoldedAttentionBlock(layers.AttentionBlock):
    """Attention written out, with the scale in the query weights."""

    casts = True  #: whether the softmax is enclosed in casts to fp32 and back

    def __init__(self, block: layers.AttentionBlock) -> None:
        nn.Module.__init__(self)
        self.norm1, self.attn, self.norm2, self.mlp = block.norm1, block.attn, block.norm2, block.mlp
        queries = self.attn.heads * self.attn.head_dim
        self.attn.qkv.weight[:queries].mul_(self.attn.head_dim**-0.5)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Like the base's, for scaled queries. PyTorch exports ``softmax(dtype=...)`` as softmax first, then cast."""
        return (q @ k.transpose(2, 3)).to(torch.float32 if self.casts else q.dtype).softmax(-1).to(q.dtype) @ v


def fold(model: AsymTrack) -> AsymTrack:
    """Returns a folded copy of a trained model, in eval mode.

    ``template`` and ``search`` of the copy return what the model's return, up to rounding.
    """
    folded = copy.deepcopy(model).eval().requires_grad_(False)
    for layer in folded.backbone.layers:
        blocks = layer.blocks
        assert isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks):
            if isinstance(block, layers.EncoderBlock):
                block.mlp.fc2.weight.mul_(block.gamma_1[:, None])
                block.mlp.fc2.bias.mul_(block.gamma_1)
                block.gamma_1 = None
            elif isinstance(block, layers.PerceptionEnhancement):
                blocks[i] = FoldedEnhancement(block)
            elif isinstance(block, layers.AttentionBlock):
                blocks[i] = FoldedAttentionBlock(block)
            elif isinstance(block, layers.TemplateModulation):
                block.conv_att = FoldedDynamicConv(block.conv_att)
    for layer in folded.box_head.children():
        if isinstance(layer, nn.Sequential):
            layer[0] = fuse_conv_bn_eval(layer[0], layer[1])  # type: ignore[arg-type,type-var]
            del layer[1]
    return folded.requires_grad_(False)


def to_half(folded: AsymTrack, casts: bool = True) -> AsymTrack:
    """Returns a copy with fp16 weights and arithmetic, but fp32 where fp16 is known to fail.

    These stay in fp32: every LayerNorm, the attention's softmax, the sums over all positions in ETM and
    everything computed from them up to the modulated prototypes, and the soft-argmax. ``casts`` encloses
    LayerNorm and softmax in casts; ONNX Runtime and PyTorch compute them in fp32 without casts.
    """
    half = copy.deepcopy(folded).half()
    for module in half.modules():
        if isinstance(module, layers.TemplateModulation):
            module.conv_att.float()
            module.proj_Cto1.float()
        elif isinstance(module, (layers.LayerNorm, FoldedAttentionBlock)):
            module.casts = casts
    return half
