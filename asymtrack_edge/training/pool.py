"""Training imagery held in memory as uint8, in one canvas per image, ready to be cropped in batches."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Dict, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from asymtrack_edge.errors import DatasetError

#: Kinds of target, the values of ``Pool.kind``.
CLIP, STILL = 0, 1

#: Smallest box, in canvas pixels per side, that can be told apart well enough to be learnt from.
SMALLEST_BOX = 4.0


@dataclass
class Pool:
    """Images and targets on one device.

    A *target* is one object in one or more images: a track of a clip, or a box of a still (a track
    of length one). Targets are stored flat: target ``t`` owns the entries ``start[t]`` to
    ``start[t] + length[t]`` of ``image`` and ``box``.

    Attributes:
        canvases: uint8 ``(N, S, S, 3)`` RGB, each image in the top-left corner, zeros elsewhere.
        sizes: float32 ``(N, 2)`` width and height of each image.
        still: int64 ``(N,)``; the frames of a clip share a number, every other image has its own.
        scenery: int64 ``(K,)``, the images that may serve as background.
        start, length, kind: int64 ``(T,)``.
        weight: float32 ``(T,)``, how often a target is drawn relative to others of its kind.
        image: int64 ``(E,)`` index into ``canvases``.
        box: float32 ``(E, 4)`` x, y, w, h in pixels.
        cutouts: uint8 ``(M, C, C, 4)`` RGBA, cropped tight, in the top-left corner.
        cutout_sizes: float32 ``(M, 2)``.
    """

    canvases: Tensor
    sizes: Tensor
    still: Tensor
    scenery: Tensor
    start: Tensor
    length: Tensor
    kind: Tensor
    weight: Tensor
    image: Tensor
    box: Tensor
    cutouts: Tensor
    cutout_sizes: Tensor

    def to(self, device: torch.device) -> Pool:
        """Moves everything to ``device``."""
        return Pool(**{name: value.to(device) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.start)

    def groups(self) -> Tensor:
        """int64 ``(T,)``: which still or clip each target is of, as numbered in ``still``."""
        return self.still[self.image[self.start]]

    def split(self, every: int = 50) -> Tuple[Pool, Pool]:
        """All but every ``every``-th still or clip, and those, for validation: targets and scenery.

        The imagery itself is shared.
        """
        held, held_scenery = (g % every == every - 1 for g in (self.groups(), self.still[self.scenery]))
        return self._only(~held, ~held_scenery), self._only(held, held_scenery)

    def _only(self, targets: Tensor, scenery: Tensor) -> Pool:
        parts = {name: getattr(self, name)[targets] for name in ("start", "length", "kind", "weight")}
        return Pool(**{**vars(self), **parts, "scenery": self.scenery[scenery]})


class PoolBuilder:
    """Collects images and targets straight into canvases.

    Args:
        side: canvas side in pixels; larger images are shrunk to it.
        capacity: most images that will be added.
    """

    def __init__(self, side: int, capacity: int) -> None:
        self.side = side
        # Untouched pages of zeros cost nothing, so memory follows what the images cover.
        self.canvases = np.zeros((max(1, capacity), side, side, 3), np.uint8)
        self.sizes: List[Tuple[int, int]] = []
        self.stills: List[int] = []
        self.targets: List[Tuple[int, str, List[int], List[Sequence[float]]]] = []
        self.cutouts: List[np.ndarray] = []

    def add_image(self, image: np.ndarray, same_clip: bool = False) -> Tuple[int, float]:
        """Stores an RGB image, shrunk where it exceeds the canvas; returns its index and scale.

        Args:
            image: uint8 ``(H, W, 3)``.
            same_clip: it is of the same clip as the one before.
        """
        scale = min(1.0, self.side / max(image.shape[:2]))
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        image = image[: self.side, : self.side]
        height, width = image.shape[:2]
        self.canvases[len(self.sizes), :height, :width] = image
        self.sizes.append((width, height))
        before = self.stills[-1] if self.stills else -1
        self.stills.append(before if same_clip else before + 1)
        return len(self.sizes) - 1, scale

    def add_target(self, kind: int, source: str, images: List[int], boxes: List[Sequence[float]]) -> None:
        """Stores a target: for each of ``images`` its box x, y, w, h in canvas pixels."""
        self.targets.append((kind, source, images, boxes))

    def add_cutout(self, image: np.ndarray) -> None:
        """Stores what is not transparent of an RGBA image, no larger than half a canvas."""
        ys, xs = np.nonzero(image[..., 3] > 127)
        if not len(xs):
            return
        tight = image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        scale = min(1.0, 0.5 * self.side / max(tight.shape[:2]))
        if scale < 1:
            width, height = (max(1, round(v * scale)) for v in tight.shape[1::-1])
            tight = cv2.resize(tight, (width, height), interpolation=cv2.INTER_AREA)
        self.cutouts.append(np.ascontiguousarray(tight))

    def add_elliptic_cutouts(self, count: int, seed: int = 0) -> None:
        """Cuts ellipses with soft rims out of the images, where no real cut-outs are at hand."""
        random = np.random.default_rng(seed)
        for _ in range(count if self.sizes else 0):
            index = int(random.integers(len(self.sizes)))
            width, height = self.sizes[index]
            w, h = (max(8, round(v * random.uniform(0.2, 0.5))) for v in (width, height))
            x, y = (int(random.integers(max(1, limit - own))) for limit, own in ((width, w), (height, h)))
            region = self.canvases[index, y : min(height, y + h), x : min(width, x + w)]
            ys, xs = np.mgrid[-1 : 1 : region.shape[0] * 1j, -1 : 1 : region.shape[1] * 1j]
            alpha = np.clip((1 - np.hypot(xs, ys)) * 8 + 0.5, 0, 1) * 255
            self.add_cutout(np.dstack([region, alpha.astype(np.uint8)]))

    def build(self) -> Pool:
        """Lays everything out as tensors.

        Raises:
            DatasetError: no image was added.
        """
        if not self.sizes:
            raise DatasetError("there is no image to train on")
        cutouts, cutout_sizes = _stack(self.cutouts)
        lengths = np.array([len(t[2]) for t in self.targets], np.int64)
        return Pool(
            canvases=torch.from_numpy(self.canvases[: len(self.sizes)]),
            sizes=torch.tensor(self.sizes, dtype=torch.float32),
            still=torch.tensor(self.stills, dtype=torch.int64),
            scenery=torch.arange(len(self.sizes)),
            start=torch.from_numpy(np.cumsum(lengths) - lengths),
            length=torch.from_numpy(lengths),
            kind=torch.tensor([t[0] for t in self.targets], dtype=torch.int64),
            weight=torch.tensor(self._weights(), dtype=torch.float32),
            image=torch.tensor([i for t in self.targets for i in t[2]], dtype=torch.int64),
            box=torch.tensor([b for t in self.targets for b in t[3]], dtype=torch.float32).reshape(-1, 4),
            cutouts=torch.from_numpy(cutouts),
            cutout_sizes=torch.from_numpy(cutout_sizes),
        )

    def _weights(self) -> List[float]:
        """A source with many targets is drawn more often, but not in proportion: square root."""
        count: Dict[Tuple[int, str], int] = {}
        for kind, source, *_ in self.targets:
            count[kind, source] = count.get((kind, source), 0) + 1
        return [count[kind, source] ** -0.5 for kind, source, *_ in self.targets]


def _stack(cutouts: Sequence[np.ndarray]) -> Tuple[np.ndarray, np.ndarray]:
    side = max([max(c.shape[:2]) for c in cutouts], default=1)
    stacked = np.zeros((len(cutouts), side, side, 4), np.uint8)
    sizes = np.ones((len(cutouts), 2), np.float32)
    for i, cutout in enumerate(cutouts):
        height, width = cutout.shape[:2]
        stacked[i, :height, :width] = cutout
        sizes[i] = width, height
    return stacked, sizes


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes an image file's bytes to uint8 RGB ``(H, W, 3)``, or RGBA where it has an alpha channel.

    Raises:
        DatasetError: the bytes are no image.
    """
    image: Optional[np.ndarray] = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
    if image is None:
        raise DatasetError(f"cannot decode the training image {name}: remove or replace the file")
    if image.dtype != np.uint8:
        image = cv2.convertScaleAbs(image, alpha=255 / np.iinfo(image.dtype).max if image.dtype.kind == "u" else 255)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)


def merge_pools(pools: Sequence[Pool]) -> Pool:
    """One pool of several with the same canvas side."""
    if len(pools) == 1:
        return pools[0]
    images = np.cumsum([0] + [len(p.canvases) for p in pools]).tolist()
    entries = np.cumsum([0] + [len(p.image) for p in pools]).tolist()
    stills = np.cumsum([0] + [int(p.still.max()) + 1 for p in pools]).tolist()
    side = max(p.cutouts.shape[1] for p in pools)

    def padded(cutouts: Tensor) -> Tensor:
        out = torch.zeros((len(cutouts), side, side, 4), dtype=torch.uint8)
        out[:, : cutouts.shape[1], : cutouts.shape[2]] = cutouts
        return out

    merged = {name: torch.cat([getattr(p, name) for p in pools]) for name in vars(pools[0]) if name != "cutouts"}
    merged["cutouts"] = torch.cat([padded(p.cutouts) for p in pools])
    merged["image"] = torch.cat([p.image + first for p, first in zip(pools, images)])
    merged["start"] = torch.cat([p.start + first for p, first in zip(pools, entries)])
    merged["scenery"] = torch.cat([p.scenery + first for p, first in zip(pools, images)])
    merged["still"] = torch.cat([p.still + first for p, first in zip(pools, stills)])
    return Pool(**merged)
