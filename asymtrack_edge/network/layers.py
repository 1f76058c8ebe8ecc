"""The network's layers: encoder, modulation (ETM), enhancement (OPE), attention and head.

Features are channels-last, ``(batch, height, width, channels)``, as in the published model. Unless stated
otherwise, every layer but the head keeps their shape. A convolution sees them through a permuted view, which
PyTorch treats as its ``channels_last`` memory format, without a copy.
"""

from __future__ import annotations

from collections import OrderedDict
from typing import Any, Dict, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F


def conv_channels_last(conv: nn.Conv2d, x: Tensor) -> Tensor:
    """Applies ``conv`` to a ``(B, H, W, C)`` tensor."""
    return conv(x.permute(0, 3, 1, 2)).permute(0, 2, 3, 1)


class DepthwiseConv(nn.Conv2d):
    """A depthwise convolution that keeps the spatial size, with custom gradients for bfloat16 on a CPU."""

    def __init__(self, width: int, kernel: int) -> None:
        super().__init__(width, width, kernel, padding=kernel // 2, groups=width)

    def forward(self, x: Tensor) -> Tensor:
        if x.requires_grad and x.dtype == torch.bfloat16 and x.device.type == "cpu":
            return _DepthwiseGradients.apply(x, self.weight.to(x.dtype), self.bias.to(x.dtype))  # type: ignore
        return super().forward(x)


class _DepthwiseGradients(torch.autograd.Function):
    """The same convolution; PyTorch's own gradient of the kernel takes three to four times as long in this case."""

    @staticmethod
    def forward(ctx: Any, x: Tensor, weight: Tensor, bias: Tensor) -> Tensor:
        ctx.save_for_backward(x, weight)
        return F.conv2d(x, weight, bias, padding=weight.shape[-1] // 2, groups=len(weight))

    @staticmethod
    def backward(ctx: Any, *gradients: Tensor) -> Tuple[Tensor, ...]:
        (x, weight), (gradient,) = ctx.saved_tensors, gradients
        batch, width, height, columns = x.shape
        size, pad = weight.shape[-1], weight.shape[-1] // 2

        def planes(maps: Tensor) -> Tensor:  # (C, B, H, W); PyTorch transposes a matrix faster than four axes
            matrix = maps.permute(0, 2, 3, 1).reshape(-1, width)
            return matrix.t().contiguous().view(width, batch, height, columns)

        seen, flat = F.pad(planes(x), (pad,) * 4), planes(gradient).flatten(1, 2)
        rows = []
        for i in range(size):
            # products[c, u, v]: padded column u of x times column v of the gradient, summed over images and rows. Tap
            # (i, j) of the kernel pairs column v + j with column v: it is the sum of the j-th diagonal.
            products = seen[:, :, i : i + height].flatten(1, 2).transpose(1, 2) @ flat
            a, b, c = products.stride()
            rows.append(products.as_strided((width, size, columns), (a, b, b + c)).sum(-1))
        back = F.conv2d(gradient, weight.flip(2, 3), padding=pad, groups=width)
        return back, torch.stack(rows, 1)[:, None], flat.sum((1, 2))


class LayerNorm(nn.LayerNorm):
    """Normalises channels in the input's data type, even under autocast; the statistics are always fp32.

    Autocast would compute it in fp32, and with it everything that is added to its output.
    """

    casts = False  #: whether it casts to fp32 and back, for runtimes that compute statistics in the input's type

    def forward(self, x: Tensor) -> Tensor:
        dtype = torch.float32 if self.casts else x.dtype
        with torch.autocast(x.device.type, enabled=False):
            weight, bias = self.weight.to(dtype), self.bias.to(dtype)
            return F.layer_norm(x.to(dtype), self.normalized_shape, weight, bias, self.eps).to(x.dtype)


class PatchEmbed(nn.Module):
    """Strided convolution and LayerNorm: the stem (7x7, stride 4) and the downsampling (3x3, stride 2)."""

    def __init__(self, inputs: int, outputs: int, kernel: int, stride: int) -> None:
        super().__init__()
        self.proj = nn.Conv2d(inputs, outputs, kernel, stride, kernel // 2)
        self.norm = LayerNorm(outputs)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, inputs)`` to ``(B, H / stride, W / stride, outputs)``."""
        return self.norm(conv_channels_last(self.proj, x))


class ContextLayer(nn.Module):
    """FC, 7x7 depthwise convolution with GELU, FC: the context that modulates a block's features."""

    def __init__(self, width: int) -> None:
        super().__init__()
        self.f = nn.Linear(width, width)
        self.g = nn.Linear(width, width)
        self.context_list = nn.ModuleList([DepthwiseConv(width, 7)])

    def forward(self, x: Tensor) -> Tensor:
        return self.g(F.gelu(conv_channels_last(self.context_list[0], self.f(x))))  # type: ignore[arg-type]


class ContextMlp(nn.Module):
    """Multiplies projected features by their context and projects back.

    Expanded features (``ratio`` above 1) pass GELU first, and context channel ``j mod width`` multiplies channel ``j``.
    """

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.ratio = ratio
        self.fc1 = nn.Linear(width, width * ratio)
        self.context_layer = ContextLayer(width)
        self.fc2 = nn.Linear(width * ratio, width)

    def forward(self, x: Tensor) -> Tensor:
        context = self.context_layer(x)
        hidden = self.fc1(x)
        if self.ratio > 1:
            hidden = F.gelu(hidden).unflatten(-1, (self.ratio, -1)) * context.unsqueeze(-2)
            return self.fc2(hidden.flatten(-2))
        return self.fc2(hidden * context)


class EncoderBlock(nn.Module):
    """EfficientMod block: ``x + gamma_1 * mlp(norm(x))`` (paper, "Lightweight Backbone"); folded, it has no gamma_1."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.gamma_1: Any = nn.Parameter(torch.full((width,), 0.5))
        self.norm = LayerNorm(width)
        self.mlp = ContextMlp(width, ratio)

    def forward(self, x: Tensor) -> Tensor:
        y = self.mlp(self.norm(x))
        return x + (y if self.gamma_1 is None else self.gamma_1.to(x.dtype) * y)


class DynamicConv(nn.Module):
    """Separable 1-D convolution over prototypes; its kernel is generated from the template (eq. 6)."""

    def __init__(self, width: int, prototypes: int) -> None:
        super().__init__()
        self.weight_linear = nn.Linear(width, 3 + prototypes)
        self.norm = LayerNorm(width)

    def kernels(self, prototypes: Tensor) -> Dict[str, Tensor]:
        """From template prototypes ``(B, N, C)``: ``taps (B, N, 3)`` and ``pointwise (B, N, N)``."""
        weights = self.weight_linear(prototypes)
        return {"taps": weights[..., :3], "pointwise": weights[..., 3:]}

    def forward(self, prototypes: Tensor, taps: Tensor, pointwise: Tensor) -> Tensor:
        """Filters search prototypes ``(B, N, C)`` along the channels, then mixes them."""
        before, here, after = taps.split(1, -1)
        padded = F.pad(prototypes, (1, 1))
        mixed = padded[..., :-2] * before + padded[..., 1:-1] * here + padded[..., 2:] * after
        return self.norm(pointwise @ F.relu(mixed))


class TemplateModulation(nn.Module):
    """Efficient template modulation (ETM) of one stage (paper, eqs. 4-7).

    The template is reduced to C / 32 prototypes, and those to the kernels of a dynamic separable 1-D convolution.
    The kernels are all that the search stream needs, so they belong to the template state. In the paper, the
    kernels depend on the search prototypes; in the published model, they depend on the template's and are
    therefore computed only once. This code follows the published model.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        prototypes = width // 32
        self.pre_kernels = nn.Linear(width, prototypes)
        self.pre_kernels_x = nn.Linear(width, prototypes)
        self.proj_Cto1 = nn.Linear(width, 1)
        self.ln = LayerNorm(width)
        self.conv_att = DynamicConv(width, prototypes)

    def template(self, z: Tensor) -> Dict[str, Tensor]:
        """Reduces template features ``(B, H, W, C)`` to this stage's part of the template state."""
        tokens = z.flatten(1, 2)
        return self.conv_att.kernels(_contract(self.pre_kernels(tokens), tokens))

    def forward(self, x: Tensor, taps: Tensor, pointwise: Tensor) -> Tensor:
        """Modulates search features ``(B, H, W, C)`` by the kernels that ``template`` returned."""
        tokens = x.flatten(1, 2)
        selection = self.pre_kernels_x(tokens)  # S_x, (B, HW, N)
        mixed = self.conv_att(_contract(selection, tokens), taps, pointwise)  # P_mix, (B, N, C)
        # The attention weighs channels, so it can be applied to the N prototypes instead of to
        # all HW positions (eq. 7, reassociated).
        mixed = mixed * (self.proj_Cto1(mixed).transpose(1, 2) @ mixed).sigmoid()
        return x + F.relu(self.ln(selection @ mixed.to(selection.dtype))).view_as(x)


def _contract(selection: Tensor, tokens: Tensor) -> Tensor:
    """Sums tokens ``(B, HW, C)`` into prototypes ``(B, N, C)`` (eq. 4), in fp32 or better.

    A sum over all positions exceeds the range of fp16; the LayerNorm that follows brings it back.
    """
    dtype = torch.promote_types(selection.dtype, torch.float32)
    return selection.to(dtype).transpose(1, 2) @ tokens.to(dtype)


class PerceptionEnhancement(nn.Module):
    """Object perception enhancement (OPE; paper, eq. 8 and "Re-parameterization Inference").

    Parallel 3x3 convolutions, each with a gradient ("local descriptor") twin. They are linear in their kernels, so
    even in training one convolution with the folded kernel gives the same result and gradients as the six in the
    paper's figure.
    """

    def __init__(self, width: int) -> None:
        super().__init__()
        self.theta = nn.Parameter(torch.zeros(1))
        self.ibe_scale: Any = nn.Parameter(torch.full((width,), 0.5))
        self.rbr_conv = nn.ModuleList([nn.Conv2d(width, width, 3, padding=1, bias=False) for _ in range(3)])
        self.ln = LayerNorm(width)

    def folded_kernel(self) -> Tensor:
        """The one kernel ``(C, C, 3, 3)`` equivalent to all branches (eq. 8, summed)."""
        kernel = torch.stack([conv.weight for conv in self.rbr_conv]).sum(0)  # type: ignore[misc]
        gradient = torch.sigmoid(self.theta) * kernel.sum((2, 3), keepdim=True)
        return kernel - F.pad(gradient, (1, 1, 1, 1))

    def forward(self, x: Tensor) -> Tensor:
        y = F.conv2d(x.permute(0, 3, 1, 2), self.folded_kernel(), padding=1).permute(0, 2, 3, 1)
        y = F.relu(self.ln(y))
        return x + (y if self.ibe_scale is None else self.ibe_scale.to(x.dtype) * y)


class Attention(nn.Module):
    """Queries, keys and values without bias, and the output projection."""

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.heads = heads
        self.head_dim = head_dim
        self.qkv = nn.Linear(width, 3 * heads * head_dim, bias=False)
        self.proj = nn.Linear(heads * head_dim, width)

    def split_heads(self, projected: Tensor, parts: int) -> Tensor:
        """``(B, L, parts * heads * dim)`` to ``(parts, B, heads, L, dim)``."""
        return projected.unflatten(-1, (parts, self.heads, self.head_dim)).permute(2, 0, 3, 1, 4)


class AttentionBlock(nn.Module):
    """Pre-norm transformer block at the end of stage 3: search tokens attend to search and template tokens.

    Only the outputs of the search tokens are read, so queries, projection and MLP run on search tokens alone. The
    template contributes its keys and values, which are computed once.
    """

    def __init__(self, width: int, heads: int, head_dim: int) -> None:
        super().__init__()
        self.norm1 = LayerNorm(width)
        self.attn = Attention(width, heads, head_dim)
        self.norm2 = LayerNorm(width)
        layers = {"fc1": nn.Linear(width, 4 * width), "gelu": nn.GELU(), "fc2": nn.Linear(4 * width, width)}
        self.mlp = nn.Sequential(OrderedDict(layers))

    def template(self, z: Tensor) -> Dict[str, Tensor]:
        """Keys and values ``(B, heads, tokens, dim)`` of template features ``(B, H, W, C)``."""
        weight = self.attn.qkv.weight[self.attn.heads * self.attn.head_dim :]
        projected = F.linear(self.norm1(z.flatten(1, 2)), weight)
        keys, values = self.attn.split_heads(projected, 2).unbind(0)
        return {"keys": keys, "values": values}

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Takes search features ``(B, H, W, C)`` and the template's keys and values."""
        tokens = x.flatten(1, 2)
        q, k, v = self.attn.split_heads(self.attn.qkv(self.norm1(tokens)), 3).unbind(0)
        k = torch.cat([k, keys], 2)
        v = torch.cat([v, values], 2)
        tokens = tokens + self.attn.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return (tokens + self.mlp(self.norm2(tokens))).view_as(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values ``(B, heads, tokens, dim)`` weighted by the attention between queries and keys."""
        return F.scaled_dot_product_attention(q, k, v)


class CornerHead(nn.Module):
    """Predicts the top-left and bottom-right corner maps (paper, "Box Prediction Head")."""

    def __init__(self, inputs: int) -> None:
        super().__init__()
        for corner in ("tl", "br"):
            width = inputs
            for i, outputs in enumerate((256, 128, 64, 32), 1):
                layer = nn.Sequential(nn.Conv2d(width, outputs, 3, padding=1), nn.BatchNorm2d(outputs), nn.ReLU())
                setattr(self, f"conv{i}_{corner}", layer)
                width = outputs
            setattr(self, f"conv5_{corner}", nn.Conv2d(width, 1, 1))

    def forward(self, x: Tensor) -> Tuple[Tensor, Tensor]:
        """Maps features ``(B, H, W, C)`` to the score maps ``(B, H, W)``, before softmax, of both corners."""
        x = x.permute(0, 3, 1, 2)
        return self._tower(x, "tl"), self._tower(x, "br")

    def _tower(self, x: Tensor, corner: str) -> Tensor:
        for i in range(1, 6):
            x = getattr(self, f"conv{i}_{corner}")(x)
        return x.squeeze(1)


def soft_argmax(scores: Tensor) -> Tensor:
    """Expected position ``(B, 2)`` as (x, y) in crop units, of score maps ``(B, H, W)``.

    A cell's coordinate is its index divided by the side, so positions lie in ``[0, (side - 1) / side]``.
    """
    height, width = scores.shape[-2:]
    probability = scores.float().flatten(1).softmax(-1).unflatten(-1, (height, width))
    xs = torch.arange(width, device=scores.device, dtype=torch.float32) / width
    ys = torch.arange(height, device=scores.device, dtype=torch.float32) / height
    return torch.stack([(probability.sum(1) * xs).sum(-1), (probability.sum(2) * ys).sum(-1)], -1)
