"""How pairs are drawn and augmented: random numbers, crops as the tracker makes them, and the augmentations.

A crop is a window of whole pixels, resized bilinearly; pixels outside the picture are zero. On a CPU, OpenCV cuts the
crops one by one, which is several times faster than sampling the batch; on other devices the whole batch is sampled at
once, at the same positions.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import NamedTuple, Tuple

import numpy as np
import torch
from torch import Tensor
from torch.nn import functional as F

from asymtrack_edge.geometry import Cropper, CropWindow
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD

#: Weights of red, green and blue in the luminance (ITU-R BT.601).
LUMA = (0.299, 0.587, 0.114)
#: Standard deviation of the rotation of a deformed crop, in radians.
TURN = 0.2


@dataclass(frozen=True)
class Augmentation:
    """How pairs are drawn and augmented. Defaults are the paper's; probabilities are per pair."""

    centre_jitter: float = 3.5  #: the search crop's centre moves by up to half of this times ``sqrt(w * h)``
    size_jitter: float = 0.5  #: the search crop's size is multiplied by ``exp(size_jitter * randn)``, per axis
    max_gap: int = 200  #: largest distance in frames between template and search frame of a clip
    greyscale: float = 0.05  #: both crops lose their colour
    flip: float = 0.5  #: both crops are mirrored
    brightness: float = 0.2  #: half width of the brightness factor, per crop
    contrast: float = 0.0  #: the same for further colour changes
    saturation: float = 0.0
    tint: float = 0.0
    deformation: float = 0.0  #: the search crop is rotated (see ``TURN``) and stretched
    stretch: float = 0.12  #: standard deviation of the logarithm of this stretch
    coarse: float = 0.0  #: the template crop loses resolution; the search crop does so half as often
    blur: float = 0.0  #: the search crop is blurred along a random direction
    occlusion: float = 0.0  #: a patch of another picture covers part of the search crop
    fill: float = 0.0  #: where the search crop leaves its picture, it shows another picture instead of black
    #: Shares of pairs made from one box of a still, and from a random region of any picture (with a teacher, the search
    #: crop comes from another frame of the same clip). The rest comes from clips. The shares apply to a ``Pool``; data
    #: sets on disk are drawn in equal parts.
    stills: float = 0.0
    patches: float = 0.0
    negatives: float = 0.0  #: the search crop does not show the target: the template is taken from another pair
    shape_changes: bool = False  #: in a ``Pool``, targets and frames with changing shapes are drawn more often


class Random:
    """A stream of random numbers on one device that depends only on its key: seed, process and step.

    A run that stopped after any step resumes with exactly the pairs that it would have seen, and loaders may prepare
    batches ahead.
    """

    def __init__(self, device: torch.device) -> None:
        self.device = device
        self.generator = torch.Generator(device)

    def start(self, *key: int) -> None:
        """Starts the stream that belongs to ``key``, a sequence of non-negative integers."""
        seed = np.random.SeedSequence(list(key)).generate_state(1, np.uint64)[0]
        self.generator.manual_seed(int(seed) >> 1)

    def uniform(self, *shape: int) -> Tensor:
        """Float32 in 0..1."""
        return torch.rand(shape, generator=self.generator, device=self.device)

    def normal(self, *shape: int) -> Tensor:
        """Float32, standard normal."""
        return torch.randn(shape, generator=self.generator, device=self.device)

    def integers(self, count: int, below: int) -> Tensor:
        """int64 ``(count,)`` in ``0 .. below - 1``."""
        return torch.randint(below, (count,), generator=self.generator, device=self.device)

    def some(self, count: int, probability: float) -> Tensor:
        """Indices below ``count``, each chosen with ``probability``."""
        if probability <= 0:
            return torch.zeros(0, dtype=torch.int64, device=self.device)
        return (self.uniform(count) < probability).nonzero()[:, 0]


class Windows(NamedTuple):
    """Square windows, one per picture, in pixels of the picture."""

    corner: Tensor  #: float32 ``(B, 2)`` left and top, whole numbers
    side: Tensor  #: float32 ``(B,)``, whole numbers
    flip: Tensor  #: bool ``(B,)``, the crop is mirrored left to right


def windows_around(centre: Tensor, side: Tensor, flip: Tensor) -> Windows:
    """Windows of ``side`` pixels ``(B,)``, rounded up, around ``centre`` ``(B, 2)``; rounded as published."""
    side = side.ceil().clamp(min=1)
    return Windows((centre - side[:, None] / 2).round(), side, flip)


def inside(windows: Windows, sizes: Tensor, size: int) -> Tensor:
    """Which pixels of the crops show their pictures of ``sizes`` ``(B, 2)``: bool ``(B, 1, size, size)``."""
    xs, ys = _positions(windows, size)
    columns = (xs >= 0) & (xs < sizes[:, :1])
    rows = (ys >= 0) & (ys < sizes[:, 1:])
    return rows[:, None, :, None] & columns[:, None, None, :]


def cut(canvases: Tensor, index: Tensor, sizes: Tensor, windows: Windows, size: int) -> Tensor:
    """Cuts windows ``(B,)`` out of canvases, uint8 ``(N, H, W, 3)``, and resizes them.

    ``index`` ``(B,)`` selects the canvases; ``sizes`` ``(B, 2)`` are width and height of the pictures on them. Returns
    uint8 ``(B, 3, size, size)`` in channels-last memory.
    """
    if canvases.device.type != "cpu":
        return cut_together(canvases, index, windows, size)
    out = np.empty((len(index), size, size, 3), np.uint8)
    pictures, cropper = canvases.numpy(), Cropper()
    for i, (n, (width, height)) in enumerate(zip(index.tolist(), sizes.long().tolist())):
        cut_one(pictures[n, :height, :width], windows, i, out[i], cropper)
    return torch.from_numpy(out).permute(0, 3, 1, 2)


def cut_together(canvases: Tensor, index: Tensor, windows: Windows, size: int) -> Tensor:
    """``cut`` as one operation on the whole batch, for GPUs."""
    height, width = canvases.shape[1:3]
    xs, ys = _positions(windows, size)
    # Resizing a crop never looks beyond the crop's own pixels.
    last = windows.side[:, None] - 0.5
    xs = torch.minimum(torch.maximum(xs, windows.corner[:, :1] + 0.5), windows.corner[:, :1] + last)
    ys = torch.minimum(torch.maximum(ys, windows.corner[:, 1:] + 0.5), windows.corner[:, 1:] + last)
    columns = (2 * xs / width - 1)[:, None, :].expand(-1, size, -1)
    rows = (2 * ys / height - 1)[:, :, None].expand(-1, -1, size)
    grid = torch.stack([columns, rows], -1)
    source = canvases[index].permute(0, 3, 1, 2).float()
    return F.grid_sample(source, grid, padding_mode="zeros", align_corners=False).round().to(torch.uint8)


def _positions(windows: Windows, size: int) -> Tuple[Tensor, Tensor]:
    """Where the crop's columns and rows lie in the picture (pixel edges are whole numbers)."""
    steps = (torch.arange(size, device=windows.side.device, dtype=torch.float32) + 0.5) / size
    steps = steps.expand(len(windows.side), -1)
    across = torch.where(windows.flip[:, None], 1 - steps, steps)
    side = windows.side[:, None]
    return windows.corner[:, :1] + across * side, windows.corner[:, 1:] + steps * side


def cut_one(picture: np.ndarray, windows: Windows, i: int, out: np.ndarray, cropper: Cropper) -> None:
    """Cuts window ``i`` out of one picture ``(H, W, 3)`` into ``out`` ``(S, S, 3)``, both uint8."""
    left, top = (int(v) for v in windows.corner[i].tolist())
    side = int(windows.side[i].item())
    cropper.crop(picture, CropWindow(left, top, side, (left + side / 2, top + side / 2)), out)
    if windows.flip[i]:
        out[...] = out[:, ::-1].copy()


def deform(search: Tensor, corners: Tensor, augmentation: Augmentation, random: Random) -> Tuple[Tensor, Tensor]:
    """Rotates and stretches some of the crops about their centre, because a still shows its target in one pose only.

    Takes uint8 crops ``(B, 3, S, S)`` and the targets' ``corners`` ``(B, 4)`` in crop units. Returns the crops,
    with their edges reflected where the rotation leaves them, and the corners of the box around the rotated
    ellipse that filled the target's box.
    """
    batch, size = len(search), search.shape[-1]
    chosen = random.some(batch, augmentation.deformation)
    if len(chosen) == 0:
        return search, corners
    angle = TURN * random.normal(len(chosen))
    stretch = torch.exp(augmentation.stretch * random.normal(len(chosen)))
    cos, sin = angle.cos(), angle.sin()
    turn = torch.stack([cos, -sin, sin, cos], 1).view(-1, 2, 2)
    scale = torch.stack([stretch, 1 / stretch], 1)
    # Maps a position before the deformation to its position after, about the centre; the grid needs the inverse.
    forward = turn * scale[:, None, :]
    backward = turn.transpose(1, 2) / scale[:, :, None]
    grid = F.affine_grid(F.pad(backward, (0, 1)), [len(chosen), 3, size, size], align_corners=False)
    turned = F.grid_sample(search[chosen].float(), grid, padding_mode="reflection", align_corners=False)
    box = corners[chosen]
    # The published convention puts the crop's centre at (S - 1) / 2 pixels.
    middle = (size - 1) / (2 * size)
    centre = (box[:, :2] + box[:, 2:]) / 2 - middle
    half = (box[:, 2:] - box[:, :2]) / 2
    centre = (forward @ centre[:, :, None])[:, :, 0] + middle
    half = (forward**2 @ (half**2)[:, :, None])[:, :, 0].sqrt()
    search, corners = search.clone(), corners.clone()
    search[chosen] = turned.round().to(torch.uint8)
    corners[chosen] = torch.cat([centre - half, centre + half], 1)
    return search, corners


def occlude(search: Tensor, corners: Tensor, probability: float, random: Random) -> Tensor:
    """Covers up to 0.6 of the target's width and height with part of the next pair's search crop; see ``deform``."""
    chosen = random.some(len(search), probability)
    count = len(chosen)
    if count == 0:
        return search
    corners = corners[chosen]
    extent = (corners[:, 2:] - corners[:, :2]).clamp(0.02, 1)
    size = extent * (0.2 + 0.4 * random.uniform(count, 2))
    low = corners[:, :2] + (extent - size * 0.5) * random.uniform(count, 2) - size * 0.25
    axis = (torch.arange(search.shape[-1], device=search.device) + 0.5) / search.shape[-1]
    inside_x = (axis >= low[:, :1]) & (axis < (low + size)[:, :1])
    inside_y = (axis >= low[:, 1:]) & (axis < (low + size)[:, 1:])
    covered = inside_y[:, None, :, None] & inside_x[:, None, None, :]
    others = search[(chosen + 1) % len(search)]
    return search.index_put((chosen,), torch.where(covered, others, search[chosen]))


def colour(image: Tensor, grey: Tensor, augmentation: Augmentation, random: Random) -> Tensor:
    """Random colour changes and the network's normalisation, as one affine map per image.

    Takes uint8 RGB ``(B, 3, H, W)`` and, as bool ``(B,)``, which images lose their colour. Returns float32
    ``(B, 3, H, W)`` in channels-last memory; the colours are clipped to 0..255 before normalisation.
    """
    batch, device = len(image), image.device

    def factor(strength: float, channels: int = 1) -> Tensor:
        return 1 + strength * (2 * random.uniform(batch, channels) - 1)

    gain = factor(augmentation.brightness) * factor(augmentation.tint, 3)
    saturation = torch.where(grey[:, None], torch.zeros_like(gain[:, :1]), factor(augmentation.saturation))
    contrast = factor(augmentation.contrast)
    luma = torch.tensor(LUMA, device=device)
    # out = gain * (mean + contrast * (grey + saturation * (in - grey) - mean)), with grey = luma . in
    matrix = saturation[:, :, None] * torch.eye(3, device=device) + (1 - saturation)[:, :, None] * luma
    matrix = (gain * contrast)[:, :, None] * matrix
    pixels = image.contiguous().flatten(2)
    shift = torch.zeros(batch, 3, 1, device=device)
    if augmentation.contrast > 0:
        # Every seventh pixel is enough for the mean (7 is coprime to the crops' sides).
        mean = pixels[:, :, ::7].float().mean(2) @ luma
        shift = (gain * ((1 - contrast) * mean[:, None]))[:, :, None]
    mean3, std3 = mean_and_std(device)
    changed = torch.baddbmm((shift - mean3) / std3, matrix / std3, pixels.float())
    changed = changed.clamp(min=-mean3 / std3, max=(255 - mean3) / std3)
    return changed.view(image.shape).contiguous(memory_format=torch.channels_last)


def mean_and_std(device: torch.device) -> Tuple[Tensor, Tensor]:
    """Mean and standard deviation of the network's input, each ``(3, 1)``, in 0..255."""
    mean = torch.tensor(IMAGE_MEAN, device=device).view(3, 1) * 255
    return mean, torch.tensor(IMAGE_STD, device=device).view(3, 1) * 255


def coarsen(image: Tensor, probability: float, random: Random) -> Tensor:
    """Reduces the resolution of some of the uint8 crops ``(B, 3, S, S)`` by a common factor of 1.5 to 4."""
    chosen = random.some(len(image), probability)
    if len(chosen) == 0:
        return image
    size = image.shape[-1]
    coarse = int(size / (1.5 + 2.5 * random.uniform(1).item()))
    crops = F.interpolate(image[chosen].float(), (coarse, coarse), mode="area")
    image = image.clone()
    image[chosen] = F.interpolate(crops, (size, size), mode="bilinear").round().clamp(0, 255).to(torch.uint8)
    return image


def motion_blur(search: Tensor, probability: float, random: Random) -> Tensor:
    """Blurs some of the float crops ``(B, 3, S, S)`` over 3 to 9 pixels along x, y or a diagonal, in place."""
    chosen = random.some(len(search), probability)
    if len(chosen) == 0:
        return search
    reach, direction = (random.integers(2, 4) + torch.tensor([1, 0], device=search.device)).tolist()
    taps = 2 * reach + 1
    steps = torch.arange(taps, device=search.device)
    middle = torch.full_like(steps, reach)
    rows = (middle, steps, steps, steps.flip(0))[direction]
    columns = middle if direction == 1 else steps
    kernel = torch.zeros(taps, taps, device=search.device)
    kernel[rows, columns] = 1 / taps
    padded = F.pad(search[chosen], (reach,) * 4, mode="replicate")
    search[chosen] = F.conv2d(padded, kernel.expand(3, 1, -1, -1), groups=3)
    return search
