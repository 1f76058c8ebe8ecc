"""How to train: the paper's recipe, and two for little data and little time."""

from __future__ import annotations

from dataclasses import dataclass, field, replace
from typing import Any, Dict, Optional

from asymtrack_edge.errors import UsageError
from asymtrack_edge.training.augmentation import Augmentation
from asymtrack_edge.training.losses import LossWeights
from asymtrack_edge.training.teacher import TeacherWeights


@dataclass(frozen=True)
class Recipe:
    """Optimisation settings. Defaults are the paper's ("Training Details" and the published code).

    Attributes:
        batch: pairs per step and process.
        lr: AdamW learning rate of neck and head.
        backbone_lr_scale: the encoder's rate over ``lr``; None gives the published 0.1 for T and
            1 for S and B.
        weight_decay: AdamW weight decay.
        clip: gradients are clipped to this norm.
        pairs_per_epoch, epochs: length of the run.
        decay_epoch: from here on the rate is a tenth; None for never.
        warmup: the rate rises linearly over this many steps; where a time budget is the length, over a
            tenth of it at most.
        cooldown: over this last part of the run the rate falls linearly to zero.
        budget_is_length: a time budget stands for the whole schedule, so that the rate has fallen
            when it ends. Otherwise it only interrupts the run.
        bf16: compute in bfloat16 where it is safe and the processor has it.
        shallow_every: stem and first stage learn in every n-th step only (one process only: several
            always train all). They hold the largest feature maps: on a CPU their gradients take a
            third of a step.
        ema: decay per step of the averaged weights that are evaluated and bundled; 0 for none.
        loss: weights of the objective's terms.
        teacher: weights of a teacher's terms, where there is one.
        divergence, patience: a run has diverged when its averaged loss has been above ``divergence``
            times its best for ``patience`` steps.
        augmentation: how pairs are drawn.
    """

    batch: int = 64
    lr: float = 4e-4
    backbone_lr_scale: Optional[float] = None
    weight_decay: float = 1e-4
    clip: float = 0.1
    pairs_per_epoch: int = 60_000
    epochs: int = 500
    decay_epoch: Optional[int] = 400
    warmup: int = 0
    cooldown: float = 0.0
    budget_is_length: bool = False
    bf16: bool = False
    shallow_every: int = 1
    ema: float = 0.0
    loss: LossWeights = field(default_factory=LossWeights)
    teacher: TeacherWeights = field(default_factory=TeacherWeights)
    divergence: float = 1.5
    patience: int = 100
    augmentation: Augmentation = field(default_factory=Augmentation)

    def rate(self, step: int, progress: float) -> float:
        """Learning rate of ``step`` when ``progress`` (0..1) of the run lies behind."""
        warm = (step + 1) / (self.warmup + 1)
        if self.budget_is_length:
            warm = max(warm, 10 * progress)
        rate = self.lr * min(1.0, warm)
        if self.decay_epoch is not None and progress * self.epochs >= self.decay_epoch:
            rate *= 0.1
        if self.cooldown > 0:
            rate *= min(1.0, max(0.0, (1 - progress) / self.cooldown))
        return rate

    @staticmethod
    def from_dict(values: Dict[str, Any]) -> Recipe:
        """The recipe whose values ``dataclasses.asdict`` gave.

        Raises:
            UsageError: a setting that this version does not know.
        """
        try:
            parts = {
                "loss": LossWeights(**values["loss"]),
                "teacher": TeacherWeights(**values["teacher"]),
                "augmentation": Augmentation(**values["augmentation"]),
            }
            return Recipe(**{**values, **parts})
        except (KeyError, TypeError) as error:
            raise UsageError(f"the stored recipe is of another version ({error}): start anew with --init") from None


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
    loss=LossWeights(giou=2.0, l1=5.0, corner=0.5),
    augmentation=Augmentation(
        centre_jitter=2.5,
        size_jitter=0.35,
        greyscale=0.1,
        brightness=0.25,
        contrast=0.2,
        saturation=0.3,
        tint=0.1,
        deformation=0.55,
        blur=0.15,
        occlusion=0.2,
        fill=0.5,
        stills=0.32,
        cutouts=0.06,
        patches=0.1,
        negatives=0.12,
    ),
)

#: As ``small``, for a batch that fills a GPU.
GPU = replace(SMALL, batch=256, cooldown=0.5, warmup=500, shallow_every=1)

PRESETS: Dict[str, Recipe] = {"paper": PAPER, "small": SMALL, "gpu": GPU}
