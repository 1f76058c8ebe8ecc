"""Training recipes: the paper's, and two for small data sets, on a CPU and on a GPU."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Dict, Optional

from asymtrack_edge.training.crops import Augmentation


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings. Defaults are the paper's ("Training Details" and the published code)."""

    batch: int = 64  #: pairs per step and process
    lr: float = 4e-4  #: AdamW learning rate of neck and head
    backbone_lr_scale: Optional[float] = None  #: the encoder's rate over ``lr``; None: 0.1 for T, 1 for S and B
    weight_decay: float = 1e-4
    clip: float = 0.1  #: gradients are clipped to this norm
    pairs_per_epoch: int = 60_000
    epochs: int = 500
    decay_epoch: Optional[int] = 400  #: the learning rate falls to a tenth at this epoch; None for never
    #: The rate rises linearly over this many steps; if a time budget sets the length, over a tenth of it at most.
    warmup: int = 0
    cooldown: float = 0.0  #: last part of the run (0..1), in which the learning rate falls linearly to zero
    #: Whether a time budget sets the length of the schedule, cooldown included; else it only interrupts the run.
    budget_is_length: bool = False
    bf16: bool = False  #: compute in bfloat16 where it is safe and the processor has it
    #: The stem and first stage learn only in every n-th step (with several processes, always). They have the largest
    #: feature maps: on a CPU, their gradients take a third of a step.
    shallow_every: int = 1
    ema: float = 0.0  #: decay per step of the averaged weights that are evaluated and bundled; 0 for none
    #: Weight of the cross-entropy between the corner maps and the cells around the true corner. It gives every cell
    #: a gradient from the first step; soft-argmax alone is slow to leave the mean position. For pairs without the
    #: target, the goal is flat maps.
    corner_loss: float = 0.0
    #: Weights of a teacher's terms: binary cross-entropy of the response map, cosine distance of the template features.
    teacher_response: float = 4.0
    teacher_features: float = 1.0
    augmentation: Augmentation = field(default_factory=Augmentation)

    def learning_rate(self, step: int, progress: float) -> float:
        """The learning rate at ``step``, when ``progress`` (0..1) of the run is done."""
        warm = (step + 1) / (self.warmup + 1)
        if self.budget_is_length:
            warm = max(warm, 10 * progress)
        rate = self.lr * min(1.0, warm)
        if self.decay_epoch is not None and progress * self.epochs >= self.decay_epoch:
            rate *= 0.1
        if self.cooldown > 0:
            rate *= min(1.0, max(0.0, (1 - progress) / self.cooldown))
        return rate


PAPER = Recipe()

SMALL = Recipe(
    batch=32,
    lr=5e-4,
    backbone_lr_scale=1.0,
    weight_decay=0.02,
    clip=1.0,
    decay_epoch=None,
    warmup=200,
    cooldown=0.25,
    budget_is_length=True,
    bf16=True,
    shallow_every=4,
    ema=0.999,
    corner_loss=0.5,
    augmentation=Augmentation(
        centre_jitter=2.5,
        size_jitter=0.35,
        greyscale=0.1,
        brightness=0.25,
        contrast=0.2,
        saturation=0.3,
        tint=0.1,
        deformation=0.55,
        stretch=0.18,
        coarse=0.33,
        blur=0.15,
        occlusion=0.2,
        fill=0.5,
        stills=0.34,
        patches=0.1,
        negatives=0.12,
        shape_changes=True,
    ),
)

#: Like ``small``, with a batch that fills a GPU. There, averaging weights has given better results with a constant
#: learning rate than with a falling one (docs/training.md).
GPU = replace(SMALL, batch=256, cooldown=0.0, warmup=500, shallow_every=1)

PRESETS: Dict[str, Recipe] = {"paper": PAPER, "small": SMALL, "gpu": GPU}
