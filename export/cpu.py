"""The folded network in the form that runs fastest on a CPU, its answers unchanged to rounding.

On a CPU nearly all time goes into multiply-adds, which ONNX Runtime's kernels do close to the rate of
a large matrix product. What is left is to do fewer of them:

* The 3x3 convolutions of stride 1 are computed by Winograd's minimal filtering F(2x2, 3x3): 16
  multiply-adds for what takes 36, for two transforms with small constant matrices. It pays where
  channels are many and positions few: OPE from 64 channels, and the first layers of the head.
* The neck is a linear layer before a linear layer: it goes into the head's first convolution. That
  convolution pads with zeros, so the neck's bias becomes a bias that depends on the position.
* Both towers' first convolutions are one, since they read the same features.

GPUs have the opposite needs (few launches, tensor cores), so only exports for CPUs take this form.
"""

from __future__ import annotations

import copy
from typing import Dict, Optional, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.export.fold import FoldedEnhancement
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.network.head import CornerHead

#: Below this many channels the transforms cost more than the multiply-adds that they save.
MIN_CHANNELS = 64

# F(2x2, 3x3) in one dimension: input, filter and output transform (Lavin and Gray, 2016, eq. 8).
_INPUT = torch.tensor([[1, 0, -1, 0], [0, 1, 1, 0], [0, -1, 1, 0], [0, 1, 0, -1]], dtype=torch.float64)
_FILTER = torch.tensor([[1, 0, 0], [0.5, 0.5, 0.5], [0.5, -0.5, 0.5], [0, 0, 1]], dtype=torch.float64)
_OUTPUT = torch.tensor([[1, 1, 1, 0], [0, 1, -1, -1]], dtype=torch.float64)


class WinogradConv(nn.Module):
    """A 3x3 convolution, stride 1, padding 1, on channels-last features.

    Args:
        weight: kernel ``(O, C, 3, 3)``.
        bias: broadcastable to ``(H, W, O)``, or None.
    """

    before: Tensor
    after: Tensor

    def __init__(self, weight: Tensor, bias: Optional[Tensor] = None) -> None:
        super().__init__()
        self.outputs, self.inputs = weight.shape[:2]
        kernel = torch.einsum("ik,ockl,jl->ijco", _FILTER, weight.double(), _FILTER)
        self.kernel = nn.Parameter(kernel.flatten(0, 1).to(weight.dtype), requires_grad=False)
        self.bias = None if bias is None else nn.Parameter(bias.clone(), requires_grad=False)
        self.register_buffer("before", torch.kron(_INPUT, _INPUT).to(weight.dtype))
        self.register_buffer("after", torch.kron(_OUTPUT, _OUTPUT).to(weight.dtype))

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to ``(B, H, W, O)``."""
        height, width = int(x.shape[1]), int(x.shape[2])
        rows, columns = (height + 1) // 2, (width + 1) // 2
        tiles = rows * columns
        padded = F.pad(x, (0, 0, 1, 1 + width % 2, 1, 1 + height % 2)).flatten(1, 2)
        patches = padded.index_select(1, _patches(rows, columns, x.device)).view(-1, 16, tiles * self.inputs)
        spectrum = torch.matmul(self.before, patches).view(-1, 16, tiles, self.inputs)
        if tiles < self.inputs:
            # ONNX Runtime packs constant matrices once, but a stack of them on every call, which takes
            # long where few rows share the work.
            parts = [part @ kernel for part, kernel in zip(spectrum.split(1, 1), self.kernel)]
            product = torch.cat(parts, 1)
        else:
            product = spectrum @ self.kernel
        y = torch.matmul(self.after, product.view(-1, 16, tiles * self.outputs))
        y = y.view(-1, 2, 2, rows, columns, self.outputs).permute(0, 3, 1, 4, 2, 5)
        y = y.reshape(-1, 2 * rows, 2 * columns, self.outputs)
        if height % 2 or width % 2:
            y = y[:, :height, :width]
        return y if self.bias is None else y + self.bias


def _patches(rows: int, columns: int, device: torch.device) -> Tensor:
    """Positions in the padded, flattened map: of each of a patch's 4x4 places, patch by patch."""
    place = torch.arange(4, device=device)
    y = place[:, None, None, None] + 2 * torch.arange(rows, device=device)[None, None, :, None]
    x = place[None, :, None, None] + 2 * torch.arange(columns, device=device)[None, None, None, :]
    return (y * (2 * columns + 2) + x).flatten()


class CpuEnhancement(nn.Module):
    """OPE with its convolution by Winograd's method."""

    def __init__(self, block: FoldedEnhancement) -> None:
        super().__init__()
        self.conv = WinogradConv(block.conv.weight)
        self.ln = block.ln
        self.ibe_scale = block.ibe_scale

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        return x + self.ibe_scale * F.relu(self.ln(self.conv(x)))


class CpuHead(nn.Module):
    """Neck and head: a first convolution for neck and both towers, then the towers.

    Args:
        neck: the linear layer before the head.
        head: with its batch normalisation folded.
        size: height and width of the features.
    """

    def __init__(self, neck: nn.Linear, head: CornerHead, size: int) -> None:
        super().__init__()
        first = [head.get_submodule(f"conv1_{corner}.0") for corner in ("tl", "br")]
        weight = torch.cat([conv.weight for conv in first]).double()  # type: ignore[misc]
        bias = torch.cat([conv.bias for conv in first]).double()  # type: ignore[misc]
        shift = neck.bias.double().view(1, -1, 1, 1).expand(1, -1, size, size)
        shift = F.conv2d(shift, weight, bias, padding=1)[0].permute(1, 2, 0)
        weight = torch.einsum("omkl,mc->ockl", weight, neck.weight.double())
        self.first = WinogradConv(weight.to(neck.weight.dtype), shift.to(neck.weight.dtype))
        self.towers = nn.ModuleDict({corner: _tower(head, corner) for corner in ("tl", "br")})

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """As ``CornerHead.forward`` of the neck's output: ``(B, H, W, C)`` to two ``(B, H, W)``."""
        y = F.relu(self.first(x))
        low, high = y.chunk(2, -1)
        return self._scores("tl", low), self._scores("br", high)

    def _scores(self, corner: str, y: Tensor) -> Tensor:
        tower = self.towers[corner]
        assert isinstance(tower, nn.ModuleDict)
        scores: Tensor = tower["rest"](F.relu(tower["second"](y)).permute(0, 3, 1, 2))
        return scores[:, 0]


def _tower(head: CornerHead, corner: str) -> nn.ModuleDict:
    conv = head.get_submodule(f"conv2_{corner}.0")
    assert isinstance(conv, nn.Conv2d)
    rest = nn.Sequential(*[head.get_submodule(f"conv{i}_{corner}") for i in (3, 4, 5)])
    return nn.ModuleDict({"second": WinogradConv(conv.weight, conv.bias), "rest": rest})


def for_cpu(folded: AsymTrack) -> AsymTrack:
    """Returns a folded model (see ``fold``) in the form for CPUs; the given one is not changed."""
    model = copy.deepcopy(folded)
    for layer in model.backbone.layers:
        blocks = layer.blocks
        assert isinstance(blocks, nn.ModuleList)
        for i, block in enumerate(blocks):
            if isinstance(block, FoldedEnhancement) and block.conv.in_channels >= MIN_CHANNELS:
                blocks[i] = CpuEnhancement(block)
    replaced: Dict[str, nn.Module] = {
        "box_head": CpuHead(model.bottleneck, model.box_head, model.variant.score_size),
        "bottleneck": nn.Identity(),
    }
    for name, module in replaced.items():
        setattr(model, name, module)
    return model.requires_grad_(False)
