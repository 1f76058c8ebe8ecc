"""Batches of training pairs, cut and augmented on the device the imagery lives on."""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Tuple

import torch
from torch import Tensor
from torch.nn import functional as F

from asymtrack_edge.training.crops import crop, inside_mask
from asymtrack_edge.training.pool import CLIP, STILL, Pool
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD, Variant


@dataclass(frozen=True)
class Augmentation:
    """How pairs are drawn and disturbed. Defaults are the paper's; probabilities are per pair.

    Attributes:
        centre_jitter: the search crop's centre moves by up to half of this times ``sqrt(w * h)``.
        size_jitter: the search crop's size is multiplied by ``exp(size_jitter * randn)``, per axis.
        max_gap: most frames between template and search frame of one clip.
        greyscale: both crops lose their colour.
        flip: both crops are mirrored.
        brightness: half width of the brightness factor, per crop.
        contrast, saturation, tint: the same for further colour changes, per crop.
        blur: the search crop is blurred along a random direction.
        occlusion: a patch of another picture covers part of the search crop.
        fill: what lies outside the picture in the search crop shows another picture, not black.
        stills, cutouts, patches: shares of pairs made from one still's box, from a pasted cut-out,
            and from an arbitrary region of any picture; the rest comes from clips.
        negatives: the target is not in the search crop: its template belongs to another pair.
    """

    centre_jitter: float = 3.5
    size_jitter: float = 0.5
    max_gap: int = 200
    greyscale: float = 0.05
    flip: float = 0.5
    brightness: float = 0.2
    contrast: float = 0.0
    saturation: float = 0.0
    tint: float = 0.0
    blur: float = 0.0
    occlusion: float = 0.0
    fill: float = 0.0
    stills: float = 0.0
    cutouts: float = 0.0
    patches: float = 0.0
    negatives: float = 0.0


class Pairs(NamedTuple):
    """One batch.

    Attributes:
        template: normalised RGB ``(B, 3, Z, Z)``.
        search: normalised RGB ``(B, 3, X, X)``.
        corners: ``(B, 4)`` x1, y1, x2, y2 of the target in search crop units (may leave 0..1).
        present: ``(B,)`` bool, whether the search crop shows the template's target.
    """

    template: Tensor
    search: Tensor
    corners: Tensor
    present: Tensor


class PairSampler:
    """Draws augmented pairs from a pool, reproducibly.

    Args:
        pool: imagery on the training device.
        variant: gives crop sizes and factors. A search size other than the published one keeps
            the scale of the target (the search factor changes in proportion).
        augmentation: see there.
        generator: the only source of randomness, so that its state resumes the data order.
    """

    def __init__(
        self, pool: Pool, variant: Variant, augmentation: Augmentation, generator: torch.Generator
    ) -> None:
        self.pool = pool
        self.variant = variant
        self.augmentation = augmentation
        self.generator = generator
        self.device = pool.canvases.device
        self.weights = {kind: pool.weight * (pool.kind == kind) for kind in (CLIP, STILL)}

    def _rand(self, *shape: int) -> Tensor:
        return torch.rand(shape, generator=self.generator, device=self.device)

    def _randn(self, *shape: int) -> Tensor:
        return torch.randn(shape, generator=self.generator, device=self.device)

    def _choose(self, count: int, among: int) -> Tensor:
        return torch.randint(among, (count,), generator=self.generator, device=self.device)

    def draw(self, batch: int) -> Pairs:
        """Makes the next batch."""
        aug = self.augmentation
        image, box = self._targets(batch)
        flip = self._rand(batch) < aug.flip
        template_box, search_box = box[:, 0], box[:, 1]
        template_side = template_box[:, 2:].prod(1).sqrt() * self.variant.template_factor
        template = crop(
            self.pool.canvases[image[:, 0]], _centre(template_box), template_side.ceil(), self.variant.template_size, flip
        )
        search, corners = self._search(image[:, 1], search_box, flip)
        count = round(aug.cutouts * batch) if len(self.pool.cutouts) else 0
        if count:
            template[:count], search[:count], corners[:count] = self._cutouts(count)
        search = self._occlude(search, corners)
        template, search = self._colour(template, search)
        search = self._blur(search)
        present = torch.ones(batch, dtype=torch.bool, device=self.device)
        if aug.negatives > 0 and batch > 1:
            present = self._rand(batch) >= aug.negatives
            template = torch.where(present[:, None, None, None], template, template.roll(1, 0))
        return Pairs(_normalise(template), _normalise(search), corners, present)

    def _targets(self, batch: int) -> Tuple[Tensor, Tensor]:
        """Image indices ``(B, 2)`` and boxes ``(B, 2, 4)`` of template and search frame."""
        aug, pool = self.augmentation, self.pool
        clips, stills = self.weights[CLIP], self.weights[STILL]
        share = aug.stills / max(1e-6, 1 - aug.cutouts - aug.patches)
        if clips.sum() == 0 or stills.sum() == 0:
            weight = pool.weight
        else:
            weight = clips / clips.sum() * (1 - share) + stills / stills.sum() * share
        target = torch.multinomial(weight, batch, True, generator=self.generator)
        length = pool.length[target]
        first = (self._rand(batch) * length).long()
        low = (first - aug.max_gap).clamp(min=0)
        high = torch.minimum(first + aug.max_gap, length - 1)
        second = low + (self._rand(batch) * (high - low + 1)).long()
        entry = pool.start[target][:, None] + torch.stack([first, second], 1)
        image, box = pool.image[entry], pool.box[entry]
        patch = self._rand(batch) < aug.patches
        return self._patches(image, box, patch)

    def _patches(self, image: Tensor, box: Tensor, chosen: Tensor) -> Tuple[Tensor, Tensor]:
        """Replaces chosen pairs by arbitrary regions of arbitrary pictures."""
        batch = len(image)
        picture = self._choose(batch, len(self.pool.canvases))
        sizes = self.pool.sizes[picture]
        extent = sizes.amin(1, keepdim=True) * (0.15 + 0.35 * self._rand(batch, 1))
        extent = extent * torch.exp(0.3 * self._randn(batch, 1) * torch.tensor([1.0, -1.0], device=self.device))
        region = torch.cat([self._rand(batch, 2) * (sizes - extent).clamp(min=0), extent], 1)
        image = torch.where(chosen[:, None], picture[:, None], image)
        box = torch.where(chosen[:, None, None], region[:, None], box)
        return image, box

    def _search(self, image: Tensor, box: Tensor, flip: Tensor) -> Tuple[Tensor, Tensor]:
        """Search crops around jittered boxes and the targets' corners in crop units."""
        aug, batch = self.augmentation, len(image)
        factor = self.variant.search_factor
        extent = box[:, 2:] * torch.exp(aug.size_jitter * self._randn(batch, 2))
        scale = extent.prod(1).sqrt()
        # At a smaller search factor the jitter shrinks, so that the target stays inside the crop.
        reach = aug.centre_jitter * (factor / 4.0)
        centre = _centre(box) + reach * scale[:, None] * (self._rand(batch, 2) - 0.5)
        side = (scale * factor).ceil().clamp(min=8)
        size = self.variant.search_size
        search = crop(self.pool.canvases[image], centre, side, size, flip)
        if aug.fill > 0:
            outside = ~inside_mask(self.pool.sizes[image], centre, side, size, flip)
            outside &= (self._rand(batch) < aug.fill)[:, None, None, None]
            search = torch.where(outside, self._background(batch, size), search)
        # Published convention: the crop's centre is pixel (S - 1) / 2.
        offset = (_centre(box) - centre) / side[:, None]
        offset = torch.where(flip[:, None], offset * torch.tensor([-1.0, 1.0], device=self.device), offset)
        middle = (size - 1) / (2 * size) + offset
        half = box[:, 2:] / side[:, None] / 2
        return search, torch.cat([middle - half, middle + half], 1)

    def _background(self, count: int, size: int) -> Tensor:
        picture = self._choose(count, len(self.pool.canvases))
        sizes = self.pool.sizes[picture]
        side = sizes.amin(1) * (0.5 + 0.5 * self._rand(count))
        centre = side[:, None] / 2 + self._rand(count, 2) * (sizes - side[:, None])
        return crop(self.pool.canvases[picture], centre, side, size, self._rand(count) < 0.5)

    def _cutouts(self, count: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Pairs that show one cut-out on two backgrounds, beside a distractor in the search crop."""
        aug, pool = self.augmentation, self.pool
        z_size, x_size = self.variant.template_size, self.variant.search_size
        chosen = self._choose(count, len(pool.cutouts))
        shape = pool.cutout_sizes[chosen]
        shape = shape / shape.prod(1, keepdim=True).sqrt()
        flip = self._rand(count) < aug.flip
        middle = torch.full((count, 2), 0.5, device=self.device)
        template = _paste(
            self._background(count, z_size), pool, chosen, middle, shape / self.variant.template_factor, flip
        )
        search = self._background(count, x_size)
        factor = self.variant.search_factor
        for _ in range(2):
            other = self._choose(count, len(pool.cutouts))
            extent = shape / factor * torch.exp(0.4 * self._randn(count, 2))
            search = _paste(search, pool, other, self._rand(count, 2), extent, self._rand(count) < 0.5)
        extent = shape / factor * torch.exp(aug.size_jitter * self._randn(count, 1))
        extent = extent * torch.exp(0.1 * self._randn(count, 2))
        at = 0.5 + (self._rand(count, 2) - 0.5) * aug.centre_jitter / 4.0
        search = _paste(search, pool, chosen, at, extent, flip)
        return template, search, torch.cat([at - extent / 2, at + extent / 2], 1)

    def _occlude(self, search: Tensor, corners: Tensor) -> Tensor:
        """Covers up to half of the target's width or height with a piece of another search crop."""
        aug, batch = self.augmentation, len(search)
        if aug.occlusion <= 0:
            return search
        extent = (corners[:, 2:] - corners[:, :2]).clamp(0.02, 1)
        size = extent * (0.2 + 0.4 * self._rand(batch, 2))
        low = corners[:, :2] + (extent - size * 0.5) * self._rand(batch, 2) - size * 0.25
        axis = (torch.arange(search.shape[-1], device=self.device) + 0.5) / search.shape[-1]
        inside_x = (axis >= low[:, :1]) & (axis < (low + size)[:, :1])
        inside_y = (axis >= low[:, 1:]) & (axis < (low + size)[:, 1:])
        mask = inside_y[:, None, :, None] & inside_x[:, None, None, :]
        mask &= (self._rand(batch) < aug.occlusion)[:, None, None, None]
        return torch.where(mask, search.roll(1, 0), search)

    def _colour(self, template: Tensor, search: Tensor) -> Tuple[Tensor, Tensor]:
        aug, batch = self.augmentation, len(template)
        grey = (self._rand(batch) < aug.greyscale)[:, None, None, None]
        return self._colour_one(template, grey), self._colour_one(search, grey)

    def _colour_one(self, image: Tensor, grey: Tensor) -> Tensor:
        aug, batch = self.augmentation, len(image)

        def factor(strength: float, channels: int = 1) -> Tensor:
            return (1 + strength * (2 * self._rand(batch, channels) - 1))[:, :, None, None]

        gain = factor(aug.brightness)
        if aug.tint > 0:
            gain = gain * factor(aug.tint, 3)
        luma = (image * image.new_tensor([0.299, 0.587, 0.114]).view(3, 1, 1)).sum(1, keepdim=True)
        saturation = torch.where(grey, torch.zeros_like(gain[:, :1]), factor(aug.saturation))
        image = luma + (image - luma) * saturation
        if aug.contrast > 0:
            mean = luma.mean((2, 3), keepdim=True)
            image = mean + (image - mean) * factor(aug.contrast)
        return (image * gain).clamp(0, 255)

    def _blur(self, search: Tensor) -> Tensor:
        """Motion blur of 3 to 9 pixels along x, y or a diagonal, for some of the search crops."""
        aug, batch = self.augmentation, len(search)
        chosen = (self._rand(batch) < aug.blur).nonzero()[:, 0]
        if len(chosen) == 0:
            return search
        length, direction = self._choose(2, 4).tolist()
        reach = length + 1
        kernel = torch.zeros(2 * reach + 1, 2 * reach + 1, device=self.device)
        steps = torch.arange(2 * reach + 1, device=self.device)
        rows = (torch.full_like(steps, reach), steps, steps, steps.flip(0))[direction]
        kernel[rows, steps if direction != 1 else torch.full_like(steps, reach)] = 1 / (2 * reach + 1)
        padded = F.pad(search[chosen], (reach,) * 4, mode="replicate")
        search[chosen] = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
        return search


def _centre(box: Tensor) -> Tensor:
    return box[:, :2] + box[:, 2:] / 2


def _normalise(image: Tensor) -> Tensor:
    mean = image.new_tensor(IMAGE_MEAN).view(3, 1, 1) * 255
    std = image.new_tensor(IMAGE_STD).view(3, 1, 1) * 255
    return ((image - mean) / std).contiguous(memory_format=torch.channels_last)


def _paste(scene: Tensor, pool: Pool, chosen: Tensor, at: Tensor, extent: Tensor, flip: Tensor) -> Tensor:
    """Composes cut-outs over scenes ``(B, 3, S, S)``; ``at`` and ``extent`` are in scene units."""
    size, side = scene.shape[-1], pool.cutouts.shape[-1]
    axis = (torch.arange(size, device=scene.device) + 0.5) / size
    u = (axis - at[:, :1]) / extent[:, :1] * torch.where(flip, -1.0, 1.0)[:, None] + 0.5
    v = (axis - at[:, 1:]) / extent[:, 1:] + 0.5
    shape = pool.cutout_sizes[chosen]
    grid_x = 2 * u * shape[:, :1] / side - 1
    grid_y = 2 * v * shape[:, 1:] / side - 1
    grid = torch.stack(
        [grid_x[:, None, :].expand(-1, size, -1), grid_y[:, :, None].expand(-1, -1, size)], -1
    )
    cutout = F.grid_sample(pool.cutouts[chosen].float(), grid, padding_mode="zeros", align_corners=False)
    alpha = cutout[:, 3:] / 255
    return scene * (1 - alpha) + cutout[:, :3] * alpha
