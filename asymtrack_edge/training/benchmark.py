"""Pairs per second of the training step, beside those of the network as it was published.

The published form runs six convolutions per OPE and lets the template's tokens pass through the
attention block, whose outputs nothing reads; and it computes in fp32. Both forms have the same
parameters and, to rounding, the same gradients.
"""

from __future__ import annotations

import statistics
import time
from typing import Callable, Dict, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.network import AsymTrack
from asymtrack_edge.network.attention import AttentionBlock
from asymtrack_edge.network.enhancement import PerceptionEnhancement
from asymtrack_edge.training.losses import LossWeights, tracking_loss
from asymtrack_edge.training.pairs import Pairs
from asymtrack_edge.training.session import has_bf16
from asymtrack_edge.variants import Variant


class ReferenceEnhancement(PerceptionEnhancement):
    """OPE as drawn in the paper: each 3x3 convolution and its gradient twin apart."""

    def forward(self, x: Tensor) -> Tensor:
        """Maps ``(B, H, W, C)`` to the same shape."""
        image = x.permute(0, 3, 1, 2)
        total = torch.zeros_like(image)
        for conv in self.rbr_conv:
            weight: Tensor = conv.weight  # type: ignore[assignment]
            difference = weight.sum((2, 3), keepdim=True)
            plain = F.conv2d(image, weight, padding=1)
            centre = F.conv2d(image, difference)
            total = total + plain - torch.sigmoid(self.theta) * centre
        return x + self.ibe_scale * F.relu(self.ln(total.permute(0, 2, 3, 1)))


class ReferenceAttentionBlock(AttentionBlock):
    """The attention block over all tokens: template tokens are queries too and pass the MLP."""

    def template(self, z: Tensor) -> Dict[str, Tensor]:
        """The template's tokens themselves, under the names the network looks for."""
        return {"keys": z.flatten(1, 2), "values": z}

    def forward(self, x: Tensor, keys: Tensor, values: Tensor) -> Tensor:
        """Search features ``(B, H, W, C)`` and what ``template`` gave; the shape stays."""
        count = x.shape[1] * x.shape[2]
        tokens = torch.cat([x.flatten(1, 2), keys], 1)
        q, k, v = self.attn.split_heads(self.attn.qkv(self.norm1(tokens)), 3).unbind(0)
        mixed = ((q @ k.transpose(-2, -1)) * self.attn.head_dim**-0.5).softmax(-1) @ v
        tokens = tokens + self.attn.proj(mixed.transpose(1, 2).flatten(2))
        return (tokens + self.mlp(self.norm2(tokens)))[:, :count].reshape(x.shape)


def reference_form(model: AsymTrack) -> AsymTrack:
    """A network with the same weights that computes as published.

    Args:
        model: in training form.
    """
    reference = AsymTrack(model.variant)
    for module in reference.modules():
        # The parameters are the same, only what is done with them differs.
        if isinstance(module, PerceptionEnhancement):
            module.__class__ = ReferenceEnhancement
        elif isinstance(module, AttentionBlock):
            module.__class__ = ReferenceAttentionBlock
    reference.load_state_dict(model.state_dict())
    return reference.to(next(model.parameters()).device)


def random_pairs(variant: Variant, batch: int, device: torch.device) -> Pairs:
    """Pairs of noise with plausible boxes, to measure with."""
    generator = torch.Generator().manual_seed(0)

    def noise(size: int) -> Tensor:
        image = torch.randn(batch, 3, size, size, generator=generator)
        return image.to(device).contiguous(memory_format=torch.channels_last)

    low = 0.3 + 0.2 * torch.rand(batch, 2, generator=generator)
    corners = torch.cat([low, low + 0.1 + 0.2 * torch.rand(batch, 2, generator=generator)], 1).to(device)
    present = torch.ones(batch, dtype=torch.bool, device=device)
    return Pairs(noise(variant.template_size), noise(variant.search_size), corners, present)


def _stepper(model: AsymTrack, pairs: Pairs, bf16: bool) -> Callable[[], None]:
    optimiser = torch.optim.AdamW(model.parameters(), 1e-5)
    kind = pairs.search.device.type

    def step() -> None:
        with torch.autocast(kind, torch.bfloat16, enabled=bf16):
            prediction = model(pairs.template, pairs.search)
        loss, _ = tracking_loss(prediction, pairs, LossWeights())
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_(model.parameters(), 0.1)
        optimiser.step()
        if kind == "cuda":
            torch.cuda.synchronize()

    return step


def compare_steps(
    variant: Variant,
    batch: int = 16,
    rounds: int = 5,
    device: torch.device = torch.device("cpu"),  # noqa: B008
) -> Dict[str, float]:
    """Pairs per second of the training step in the reference form and in this package's.

    The forms take turns, so that whatever else the machine does touches all of them; each figure
    is the median over the rounds.

    Args:
        variant: which network.
        batch: pairs per step.
        rounds: steps of each form that are timed, after one that is not.
        device: where to compute.

    Returns:
        By form: ``reference_fp32``, ``asymtrack_edge_fp32``, and ``asymtrack_edge_bf16`` where the
        device computes in bfloat16.
    """
    torch.manual_seed(0)
    pairs = random_pairs(variant, batch, device)
    model = AsymTrack(variant).to(device).train()
    forms: Dict[str, Tuple[AsymTrack, bool]] = {
        "reference_fp32": (reference_form(model).train(), False),
        "asymtrack_edge_fp32": (model, False),
    }
    if has_bf16(device):
        own = AsymTrack(variant).to(device).train()
        forms["asymtrack_edge_bf16"] = (own, True)
    steps = {name: _stepper(form, pairs, bf16) for name, (form, bf16) in forms.items()}
    for step in steps.values():
        step()
    seconds: Dict[str, List[float]] = {name: [] for name in steps}
    for _ in range(rounds):
        for name, step in steps.items():
            began = time.perf_counter()
            step()
            seconds[name].append(time.perf_counter() - began)
    return {name: batch / statistics.median(times) for name, times in seconds.items()}
