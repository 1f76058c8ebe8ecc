"""Training objective: ``2 GIoU + 5 L1`` (paper, eq. 9) and an optional term on the corner maps."""

from __future__ import annotations

from typing import Callable, Dict, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from asymtrack_edge.network import Prediction
from asymtrack_edge.training.pairs import Pairs

#: Weights of the generalised IoU of the boxes and of the mean absolute difference of their corners.
GIOU, L1 = 2.0, 5.0


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


def tracking_loss(
    prediction: Prediction, pairs: Pairs, corner: float, average: Callable[[Tensor], Tensor] = lambda value: value
) -> Tuple[Tensor, Dict[str, Tensor]]:
    """The weighted sum of all terms, over the pairs that are known.

    Args:
        prediction: what the network says of the pairs.
        pairs: what it was shown.
        corner: see ``Recipe``.
        average: the mean of a number over all processes, so that pairs count alike in each.

    Returns:
        The loss, and what to log (detached): ``giou``, ``l1``, ``corner``, ``iou``.
    """
    target = pairs.corners.clamp(0, 1)
    present = (pairs.present & pairs.known).float()

    def mean(values: Tensor, of: Tensor) -> Tensor:
        return (values * of).sum() / average(of.sum()).clamp(min=1e-6)

    iou, giou = iou_and_giou(prediction.corners, target)
    terms = {
        "giou": mean(1 - giou, present),
        "l1": mean((prediction.corners - target).abs().mean(1), present),
    }
    loss = GIOU * terms["giou"] + L1 * terms["l1"]
    if corner > 0:
        maps = torch.stack([prediction.score_tl, prediction.score_br], 1).float()
        side = maps.shape[-1]
        wanted = corner_targets(target, side)
        wanted = torch.where(pairs.present[:, None, None], wanted, torch.full_like(wanted, side**-2))
        entropy = -(wanted * F.log_softmax(maps.flatten(2), -1)).sum(-1).mean(1)
        terms["corner"] = mean(entropy, pairs.known.float())
        loss = loss + corner * terms["corner"]
    terms["iou"] = mean(iou, present)
    return loss, {name: value.detach() for name, value in terms.items()}
