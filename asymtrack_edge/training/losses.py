"""Training objective: ``2 GIoU + 5 L1`` (paper, eq. 9) and an optional term on the corner maps."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from asymtrack_edge.network import Prediction
from asymtrack_edge.training.pairs import Pairs


@dataclass(frozen=True)
class LossWeights:
    """Weights of the terms; the defaults are the paper's.

    Attributes:
        giou: generalised IoU loss of the boxes.
        l1: mean absolute difference of the corners, in crop units.
        corner: cross-entropy between the corner maps and the cells around the true corner. It
            gives every cell a gradient from the first step, where soft-argmax alone is slow to
            leave the mean position. Pairs without the target are taught flat maps by it.
    """

    giou: float = 2.0
    l1: float = 5.0
    corner: float = 0.0


def iou_and_giou(a: Tensor, b: Tensor) -> Tuple[Tensor, Tensor]:
    """IoU and generalised IoU of corner boxes ``(B, 4)`` (Rezatofighi et al. 2019), each ``(B,)``."""
    area_a = (a[:, 2:] - a[:, :2]).clamp(min=0).prod(1)
    area_b = (b[:, 2:] - b[:, :2]).clamp(min=0).prod(1)
    inter = (torch.minimum(a[:, 2:], b[:, 2:]) - torch.maximum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    union = area_a + area_b - inter
    hull = (torch.maximum(a[:, 2:], b[:, 2:]) - torch.minimum(a[:, :2], b[:, :2])).clamp(min=0).prod(1)
    iou = inter / union.clamp(min=1e-9)
    return iou, iou - (hull - union) / hull.clamp(min=1e-9)


def corner_targets(corners: Tensor, side: int) -> Tensor:
    """Distributions ``(B, 2, side * side)`` whose expected positions are the two corners.

    The mass is split bilinearly over the four cells around each corner, so that the soft-argmax of
    the target is the corner itself (as far as the map reaches).
    """
    position = corners.view(-1, 2, 2) * side
    cells = torch.arange(side, device=corners.device, dtype=corners.dtype)
    near = (1 - (position.clamp(0, side - 1)[..., None] - cells).abs()).clamp(min=0)
    return (near[:, :, 1, :, None] * near[:, :, 0, None, :]).flatten(2)


def tracking_loss(prediction: Prediction, pairs: Pairs, weights: LossWeights) -> Tuple[Tensor, Dict[str, Tensor]]:
    """The weighted sum of all terms, and what to log (detached): ``giou``, ``l1``, ``corner``, ``iou``."""
    target = pairs.corners.clamp(0, 1)
    present = pairs.present.float()
    count = present.sum().clamp(min=1)
    iou, giou = iou_and_giou(prediction.corners, target)
    terms = {
        "giou": ((1 - giou) * present).sum() / count,
        "l1": ((prediction.corners - target).abs().mean(1) * present).sum() / count,
    }
    loss = weights.giou * terms["giou"] + weights.l1 * terms["l1"]
    if weights.corner > 0:
        maps = torch.stack([prediction.score_tl, prediction.score_br], 1).float()
        side = maps.shape[-1]
        wanted = corner_targets(target, side)
        wanted = torch.where(pairs.present[:, None, None], wanted, torch.full_like(wanted, side**-2))
        terms["corner"] = -(wanted * F.log_softmax(maps.flatten(2), -1)).sum(-1).mean()
        loss = loss + weights.corner * terms["corner"]
    terms["iou"] = (iou * present).sum() / count
    return loss, {name: value.detach() for name, value in terms.items()}
