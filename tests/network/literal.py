"""The network once more, slowly and as literally as it is published.

Written from the description alone, as functions of a state_dict: six convolutions for OPE, a loop
over the batch in ETM, template and search tokens all the way through the attention block, BatchNorm
unfolded, features as (B, C, H, W). It shares no code with the package.
"""

from __future__ import annotations

from typing import Dict, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

State = Dict[str, Tensor]


def part(state: State, prefix: str) -> State:
    return {k[len(prefix) + 1 :]: v for k, v in state.items() if k.startswith(prefix + ".")}


def linear(state: State, name: str, x: Tensor) -> Tensor:
    y = x @ state[name + ".weight"].T
    return y + state[name + ".bias"] if name + ".bias" in state else y


def norm(state: State, name: str, x: Tensor) -> Tensor:
    """LayerNorm over the last axis."""
    mean = x.mean(-1, keepdim=True)
    variance = ((x - mean) ** 2).mean(-1, keepdim=True)
    return (x - mean) / (variance + 1e-5).sqrt() * state[name + ".weight"] + state[name + ".bias"]


def gelu(x: Tensor) -> Tensor:
    return x * 0.5 * (1 + torch.erf(x / 2**0.5))


def last(x: Tensor) -> Tensor:
    return x.permute(0, 2, 3, 1)


def first(x: Tensor) -> Tensor:
    return x.permute(0, 3, 1, 2)


def embed(state: State, x: Tensor, stride: int, padding: int) -> Tensor:
    x = F.conv2d(x, state["proj.weight"], state["proj.bias"], stride, padding)
    return first(norm(state, "norm", last(x)))


def encoder_block(state: State, x: Tensor) -> Tensor:
    y = norm(state, "norm", last(x))
    width = y.shape[-1]
    layer = part(state, "mlp.context_layer")
    kernel, bias = layer["context_list.0.weight"], layer["context_list.0.bias"]
    context = F.conv2d(first(linear(layer, "f", y)), kernel, bias, padding=3, groups=width)
    context = linear(layer, "g", gelu(last(context)))
    hidden = linear(state, "mlp.fc1", y)
    if hidden.shape[-1] == width:
        mixed = hidden * context
    else:
        mixed = gelu(hidden) * torch.cat([context] * (hidden.shape[-1] // width), -1)
    return x + first(state["gamma_1"] * linear(state, "mlp.fc2", mixed))


def modulation(state: State, z: Tensor, x: Tensor) -> Tensor:
    outputs = []
    for i in range(len(x)):
        height, width = x.shape[-2:]
        z_tokens = last(z)[i].reshape(-1, z.shape[1])
        x_tokens = last(x)[i].reshape(-1, x.shape[1])
        template = linear(state, "pre_kernels", z_tokens).T @ z_tokens
        selection = linear(state, "pre_kernels_x", x_tokens)
        prototypes = selection.T @ x_tokens
        kernels = linear(state, "conv_att.weight_linear", template)
        count = len(prototypes)
        taps, pointwise = kernels[:, :3].reshape(count, 1, 3), kernels[:, 3:].reshape(count, count, 1)
        filtered = F.relu(F.conv1d(prototypes[None], taps, padding=1, groups=count))
        kernel = norm(state, "conv_att.norm", F.conv1d(filtered, pointwise)[0])
        modulated = selection @ kernel
        weights = linear(state, "proj_Cto1", kernel)
        attention = torch.sigmoid(torch.stack([weights[n] * kernel[n] for n in range(count)]).sum(0))
        y = x_tokens + F.relu(norm(state, "ln", modulated * attention))
        outputs.append(y.reshape(height, width, -1).permute(2, 0, 1))
    return torch.stack(outputs)


def enhancement(state: State, x: Tensor) -> Tensor:
    total = torch.zeros_like(x)
    for i in range(3):
        kernel = state[f"rbr_conv.{i}.weight"]
        total = total + F.conv2d(x, kernel, padding=1)
        sums = kernel.sum(dim=(2, 3))[:, :, None, None]
        total = total - torch.sigmoid(state["theta"]) * F.conv2d(x, sums)
    return x + first(state["ibe_scale"] * F.relu(norm(state, "ln", last(total))))


def attention_block(state: State, z: Tensor, x: Tensor, heads: int) -> Tuple[Tensor, Tensor]:
    """Both streams, as one sequence: search tokens, then template tokens."""
    shapes = last(x).shape, last(z).shape
    x_tokens, z_tokens = last(x).flatten(1, 2), last(z).flatten(1, 2)
    tokens = torch.cat([x_tokens, z_tokens], 1)
    q, k, v = linear(state, "attn.qkv", norm(state, "norm1", tokens)).chunk(3, -1)
    mixed = []
    for head in range(heads):
        dim = q.shape[-1] // heads
        own = slice(head * dim, (head + 1) * dim)
        scores = q[..., own] @ k[..., own].transpose(1, 2) / dim**0.5
        mixed.append(scores.softmax(-1) @ v[..., own])
    tokens = tokens + linear(state, "attn.proj", torch.cat(mixed, -1))
    tokens = tokens + linear(state, "mlp.fc2", gelu(linear(state, "mlp.fc1", norm(state, "norm2", tokens))))
    x_tokens, z_tokens = tokens.split([x_tokens.shape[1], z_tokens.shape[1]], 1)
    return first(z_tokens.reshape(shapes[1])), first(x_tokens.reshape(shapes[0]))


def tower(state: State, x: Tensor, corner: str) -> Tensor:
    for i in range(1, 5):
        layer = part(state, f"conv{i}_{corner}")
        x = F.conv2d(x, layer["0.weight"], layer["0.bias"], padding=1)
        mean, variance, scale, shift = (
            layer[f"1.{name}"][:, None, None] for name in ("running_mean", "running_var", "weight", "bias")
        )
        x = F.relu((x - mean) / (variance + 1e-5).sqrt() * scale + shift)
    return F.conv2d(x, state[f"conv5_{corner}.weight"], state[f"conv5_{corner}.bias"])[:, 0]


def corner_position(scores: Tensor) -> Tensor:
    """Expected (x, y) in crop units, cell by cell."""
    size = scores.shape[-1]
    positions = torch.zeros(len(scores), 2, dtype=scores.dtype)
    for i, score in enumerate(scores):
        probability = torch.exp(score - score.max())
        probability = probability / probability.sum()
        for row in range(size):
            for column in range(size):
                cell = torch.tensor([32.0 * column, 32.0 * row], dtype=scores.dtype)
                positions[i] += probability[row, column] * cell / (32 * size)
    return positions


def forward(state: State, depths: Tuple[int, ...], template: Tensor, search: Tensor) -> Dict[str, Tensor]:
    """Everything the network computes on the way to the box, features as (B, H, W, C)."""
    backbone = part(state, "backbone")
    z = embed(part(backbone, "patch_embed"), template, 4, 3)
    x = embed(part(backbone, "patch_embed"), search, 4, 3)
    found = {}
    for stage in range(3):
        layer = part(backbone, f"layers.{stage}")
        index = depths[stage]
        for i in range(index):
            block = part(layer, f"blocks.{i}")
            z, x = encoder_block(block, z), encoder_block(block, x)
        if stage > 0:
            x = modulation(part(layer, f"blocks.{index}"), z, x)
            index += 1
        block = part(layer, f"blocks.{index}")
        z, x = enhancement(block, z), enhancement(block, x)
        if stage == 2:
            z, x = attention_block(part(layer, f"blocks.{index + 1}"), z, x, 8)
        z = embed(part(layer, "downsample"), z, 2, 1)
        x = embed(part(layer, "downsample"), x, 2, 1)
        found[f"stride{8 << stage}"] = last(x)
    x = first(linear(state, "bottleneck", last(x)))
    head = part(state, "box_head")
    found["score_tl"], found["score_br"] = tower(head, x, "tl"), tower(head, x, "br")
    low, high = corner_position(found["score_tl"]), corner_position(found["score_br"])
    found["box"] = torch.cat([(low + high) / 2, high - low], -1)
    return found
