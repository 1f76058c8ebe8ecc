"""The one attention block, at the end of stage 3.

Only the search tokens' outputs are ever read, so queries, projection and MLP run on search tokens
alone, and the template contributes its keys and values, computed once.
"""

from __future__ import annotations

from typing import Dict

import torch
from torch import Tensor, nn
from torch.nn import functional as F


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


class Mlp(nn.Module):
    """FC, GELU, FC."""

    def __init__(self, width: int, ratio: int) -> None:
        super().__init__()
        self.fc1 = nn.Linear(width, ratio * width)
        self.fc2 = nn.Linear(ratio * width, width)

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(..., C)`` to the same shape."""
        return self.fc2(F.gelu(self.fc1(x)))


class AttentionBlock(nn.Module):
    """Pre-norm transformer block in which search tokens attend to search and template tokens."""

    def __init__(self, width: int, heads: int, head_dim: int, mlp_ratio: int = 4) -> None:
        super().__init__()
        self.norm1 = nn.LayerNorm(width)
        self.attn = Attention(width, heads, head_dim)
        self.norm2 = nn.LayerNorm(width)
        self.mlp = Mlp(width, mlp_ratio)

    def template(self, z: Tensor) -> Dict[str, Tensor]:
        """Keys and values ``(B, heads, tokens, dim)`` of template features ``(B, H, W, C)``."""
        weight = self.attn.qkv.weight[self.attn.heads * self.attn.head_dim :]
        projected = F.linear(self.norm1(z.flatten(1, 2)), weight)
        keys, values = self.attn.split_heads(projected, 2).unbind(0)
        return {"keys": keys, "values": values}

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Search features ``(B, H, W, C)`` and the template's keys and values; the shape stays."""
        tokens = x.flatten(1, 2)
        q, k, v = self.attn.split_heads(self.attn.qkv(self.norm1(tokens)), 3).unbind(0)
        k = torch.cat([k, keys], 2)
        v = torch.cat([v, values], 2)
        tokens = tokens + self.attn.proj(self.mix(q, k, v).transpose(1, 2).flatten(2))
        return (tokens + self.mlp(self.norm2(tokens))).view_as(x)

    def mix(self, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        """Values ``(B, heads, tokens, dim)`` weighted by the attention of the queries to the keys."""
        return F.scaled_dot_product_attention(q, k, v)
