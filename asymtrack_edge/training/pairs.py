"""Batches of training pairs, from images in memory or data sets on disk, augmented on the training device."""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass, field
from pathlib import Path
from typing import Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from asymtrack_edge.datasets import Dataset
from asymtrack_edge.datasets.sequences import read_frame
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.files import printable
from asymtrack_edge.geometry import Cropper
from asymtrack_edge.training import crops
from asymtrack_edge.training.crops import Augmentation, Random, Windows
from asymtrack_edge.training.imagery import CLIP, STILL, LeftOut, Pool
from asymtrack_edge.variants import Variant

#: A negative takes its template from the pair this many places further on. The next pair's crop may be the occluder,
#: and the occluder must not reveal whether the target is there.
STRANGER = 2
#: Batches that are prepared ahead.
AHEAD = 3
#: How many targets are drawn in search of a visible one.
TRIES = 10_000


class Pairs(NamedTuple):
    """One batch."""

    template: Tensor  #: normalised RGB ``(B, 3, Z, Z)``
    search: Tensor  #: normalised RGB ``(B, 3, X, X)``
    corners: Tensor  #: ``(B, 4)`` x1, y1, x2, y2 of the target in search crop units (may leave 0..1)
    present: Tensor  #: bool ``(B,)``, whether the search crop shows the template's target
    known: Tensor  #: bool ``(B,)``, whether ``corners`` and ``present`` are right; always true without a teacher
    aspect: Tensor  #: ``(B,)``, width over height of the target in the template


#: Makes the batch of a step: ``draw(batch, step)``. The same step always gives the same batch.
DrawPairs = Callable[[int, int], Pairs]
#: Where a batch of pairs is cut: windows of template and search region, corners and aspect as in ``Pairs``.
Plan = Tuple[Windows, Windows, Tensor, Tensor]


def plan_windows(
    template_box: Tensor, search_box: Tensor, variant: Variant, augmentation: Augmentation, random: Random
) -> Plan:
    """Chooses the windows of a batch, with the published jitter (search region only) and flip.

    The boxes are ``(B, 4)`` x, y, w, h in pixels of the template picture and of the search picture.
    """
    batch = len(template_box)
    flip = random.uniform(batch) < augmentation.flip
    template_side = template_box[:, 2:].prod(1).sqrt() * variant.template_factor
    extent = search_box[:, 2:] * torch.exp(augmentation.size_jitter * random.normal(batch, 2))
    scale = extent.prod(1).sqrt()
    reach = augmentation.centre_jitter * scale
    centre = _centre(search_box) + reach[:, None] * (random.uniform(batch, 2) - 0.5)
    search = crops.windows_around(centre, (scale * variant.search_factor).clamp(min=8), flip)
    # Published convention: the crop's centre is pixel (S - 1) / 2, and boxes are placed relative to it.
    offset = (_centre(search_box) - centre) / search.side[:, None]
    offset = torch.stack([torch.where(flip, -offset[:, 0], offset[:, 0]), offset[:, 1]], 1)
    middle = (variant.search_size - 1) / (2 * variant.search_size) + offset
    half = search_box[:, 2:] / search.side[:, None] / 2
    template = crops.windows_around(_centre(template_box), template_side, flip)
    return template, search, torch.cat([middle - half, middle + half], 1), template_box[:, 2] / template_box[:, 3]


def finish_pairs(pairs: Pairs, identity: Tensor, augmentation: Augmentation, random: Random) -> Pairs:
    """Deforms, occludes, coarsens, colours and blurs pairs of uint8 RGB crops from any source; makes negatives.

    ``identity``, int64 ``(B,)``, is the same for pairs whose pictures may show the same target.
    """
    batch = len(pairs.template)
    search, corners = crops.deform(pairs.search, pairs.corners, augmentation, random)
    search = crops.occlude(search, corners, augmentation.occlusion, random)
    grey = random.uniform(batch) < augmentation.greyscale
    template = crops.colour(crops.coarsen(pairs.template, augmentation.coarse, random), grey, augmentation, random)
    search = crops.coarsen(search, augmentation.coarse / 2, random)
    search = crops.motion_blur(crops.colour(search, grey, augmentation, random), augmentation.blur, random)
    present, aspect = pairs.present, pairs.aspect
    if augmentation.negatives > 0 and batch > 2 * STRANGER:
        # In a smaller batch, every other pair may share a picture with this one.
        present = (random.uniform(batch) >= augmentation.negatives) | (identity == identity.roll(-STRANGER))
        template = torch.where(present[:, None, None, None], template, template.roll(-STRANGER, 0))
        aspect = torch.where(present, aspect, aspect.roll(-STRANGER))
    return Pairs(template, search, corners, present, pairs.known | ~present, aspect)


@dataclass
class PairSampler:
    """Draws augmented pairs from a pool; seed, process and step decide which."""

    pool: Pool  #: imagery, on the device where the pairs are made
    variant: Variant  #: gives crop sizes and factors
    augmentation: Augmentation
    seed: int = 0
    rank: int = 0
    #: Whether a teacher labels the pairs: then a random region is searched for in another frame of its clip.
    teacher: bool = False

    def __post_init__(self) -> None:
        aug, pool = self.augmentation, self.pool
        self.random = Random(pool.canvases.device)
        #: How often each target is drawn, with clips and stills in the requested shares.
        self.weight = pool.weight
        self.log_size = pool.box[:, 2:].log()
        if aug.shape_changes:
            self.weight, sizes = pool.weight.clone(), self.log_size.cpu()
            for clip in torch.nonzero(pool.kind == CLIP)[:, 0].tolist():
                start = int(pool.start[clip])
                spread = sizes[start : start + int(pool.length[clip])].std(0, unbiased=False).sum()
                self.weight[clip] *= 0.15 + min(0.85, float(spread))
        clips, stills = (self.weight * (pool.kind == kind) for kind in (CLIP, STILL))
        if clips.sum() > 0 and stills.sum() > 0:
            share = min(1.0, aug.stills / max(1e-6, 1 - aug.patches))
            self.weight = clips / clips.sum() * (1 - share) + stills / stills.sum() * share
        _, group, count = torch.unique_consecutive(pool.group, return_inverse=True, return_counts=True)
        end = count.cumsum(0)[group]
        #: First and last frame of the clip of each image.
        self.clip = torch.stack([end - count[group], end - 1], 1)

    def draw(self, batch: int, step: int) -> Pairs:
        """Makes the ``batch`` pairs of ``step``."""
        pool, variant, random = self.pool, self.variant, self.random
        random.start(self.seed, self.rank, step)
        image, box, known = self._targets(batch)
        around, region, corners, aspect = plan_windows(box[:, 0], box[:, 1], variant, self.augmentation, random)
        template = self._cut(image[:, 0], around, variant.template_size)
        search = self._fill(self._cut(image[:, 1], region, variant.search_size), image[:, 1], region)
        pairs = Pairs(template, search, corners, torch.ones_like(known), known, aspect)
        return finish_pairs(pairs, pool.group[image[:, 1]], self.augmentation, random)

    def _cut(self, image: Tensor, windows: Windows, size: int) -> Tensor:
        return crops.cut(self.pool.canvases, image, self.pool.sizes[image], windows, size)

    def _targets(self, batch: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Images ``(B, 2)`` and boxes ``(B, 2, 4)`` of template and search frames; whether they are known ``(B,)``."""
        pool, random = self.pool, self.random
        image, box, known = self._regions(batch)
        if not len(pool):
            return image, box, known
        target = torch.multinomial(self.weight, batch, replacement=True, generator=random.generator)
        length = pool.length[target]
        first = (random.uniform(batch) * length).long().clamp(max=length - 1)
        entry = pool.start[target][:, None] + torch.stack([first, self._second(target, first)], 1)
        arbitrary = random.uniform(batch) < self.augmentation.patches
        image = torch.where(arbitrary[:, None], image, pool.image[entry])
        return image, torch.where(arbitrary[:, None, None], box, pool.box[entry]), known | ~arbitrary

    def _second(self, target: Tensor, first: Tensor) -> Tensor:
        """A frame to search for ``target``; ``shape_changes`` prefers frames where its size or aspect differs."""
        last, start = self.pool.length[target] - 1, self.pool.start[target][:, None]
        if not self.augmentation.shape_changes:
            return self._near(first, torch.zeros_like(first), last)
        second = torch.stack([self._near(first, torch.zeros_like(first), last) for _ in range(3)], 1)
        change = (self.log_size[start + second] - self.log_size[start + first[:, None]]).abs().sum(-1)
        choice = torch.multinomial(0.1 + change.clamp(max=2), 1, generator=self.random.generator)
        return second.gather(1, choice)[:, 0]

    def _near(self, first: Tensor, low: Tensor, high: Tensor) -> Tensor:
        """A random integer from ``low`` to ``high``, at most ``max_gap`` from ``first``."""
        gap = self.augmentation.max_gap
        low, high = torch.maximum(first - gap, low), torch.minimum(first + gap, high)
        return torch.minimum(low + (self.random.uniform(len(first)) * (high - low + 1)).long(), high)

    def _regions(self, batch: int) -> Tuple[Tensor, Tensor, Tensor]:
        """Random regions of random pictures, as from ``_targets``; without a teacher, both are in one frame."""
        random = self.random
        picture, sizes = self._scenery(batch)
        extent = sizes.amin(1, keepdim=True) * (0.15 + 0.35 * random.uniform(batch, 1))
        aspect = torch.tensor([1.0, -1.0], device=random.device)
        extent = extent * torch.exp(0.3 * random.normal(batch, 1) * aspect)
        region = torch.cat([random.uniform(batch, 2) * (sizes - extent).clamp(min=0), extent], 1)
        other = self._near(picture, *self.clip[picture].unbind(1)) if self.teacher else picture
        return torch.stack([picture, other], 1), region[:, None].expand(-1, 2, -1), picture == other

    def _fill(self, search: Tensor, image: Tensor, windows: Windows) -> Tensor:
        """Shows another picture where some of the search crops leave their own."""
        random, size = self.random, search.shape[-1]
        chosen = random.some(len(search), self.augmentation.fill)
        count = len(chosen)
        if count:
            picture, sizes = self._scenery(count)
            side = sizes.amin(1) * (0.5 + 0.5 * random.uniform(count))
            centre = side[:, None] / 2 + random.uniform(count, 2) * (sizes - side[:, None])
            behind = self._cut(picture, crops.windows_around(centre, side, random.uniform(count) < 0.5), size)
            seen = crops.inside(Windows(*(v[chosen] for v in windows)), self.pool.sizes[image[chosen]], size)
            search[chosen] = torch.where(seen, search[chosen], behind)
        return search

    def _scenery(self, count: int) -> Tuple[Tensor, Tensor]:
        """Random pictures from ``Pool.scenery``, int64 ``(count,)``, and their sizes ``(count, 2)``."""
        picture = self.pool.scenery[self.random.integers(count, len(self.pool.scenery))]
        return picture, self.pool.sizes[picture]


#: A pair's template crop, search crop, and width and height of the search frame.
_Crops = Tuple[np.ndarray, np.ndarray, Tuple[int, int]]
#: A batch in preparation: its windows, the target of each pair ``(B,)``, and its crops.
_Job = Tuple[Plan, Tensor, "List[Future[_Crops]]"]


@dataclass
class DiskPairs:
    """Draws augmented pairs from data sets too large for memory, in equal parts; seed, process and step decide which.

    The windows are chosen from annotations alone, before any frame is opened. Threads decode frames ahead and cut the
    windows out of them at full resolution, with the tracker's own arithmetic. Only the finished crops go to the
    training device, where everything else happens in batches.
    """

    datasets: Sequence[Dataset]  #: at least one
    variant: Variant  #: gives crop sizes and factors
    augmentation: Augmentation
    device: torch.device  #: where the batches go
    seed: int = 0
    #: This process's number and the number of processes: each draws from every n-th target.
    share: Tuple[int, int] = (0, 1)
    workers: Optional[int] = None  #: threads that read and decode; by default one per CPU, up to 16
    left_out: LeftOut = field(default_factory=LeftOut)  #: gets the reasons why frames and sequences cannot be read

    def __post_init__(self) -> None:
        self.planning, self.finishing = Random(torch.device("cpu")), Random(self.device)
        self.threads = ThreadPoolExecutor(self.workers or min(16, os.cpu_count() or 1))
        self.jobs: Dict[Tuple[int, int], _Job] = {}

    def draw(self, batch: int, step: int) -> Pairs:
        """Makes the ``batch`` pairs of ``step``. A pair whose frames cannot be read is replaced by another.

        Raises:
            DatasetError: no frame or no annotation for the batch can be read.
        """
        wanted = [(batch, step + i) for i in range(AHEAD + 1)]
        self.jobs = {key: self.jobs.get(key) or self._submit(*key) for key in wanted}
        for dataset in self.datasets:
            for reason in dataset.left_out:
                self.left_out.tell(reason)
        plan, target, waiting = self.jobs.pop((batch, step))
        _, region, corners, aspect = plan
        read: Dict[int, _Crops] = {}
        for i, crop in enumerate(waiting):
            try:
                read[i] = crop.result()
            except DatasetError as error:
                self.left_out.tell(str(error))
        if not read:
            waiting[0].result()  # raises its error
        good = list(read)
        places = [i if i in read else good[i % len(good)] for i in range(batch)]
        region = Windows(*(values[places] for values in region))
        corners, aspect = corners[places].to(self.device), aspect[places].to(self.device)
        templates, searches, sizes = zip(*(read[i] for i in places))
        self.finishing.start(self.seed, self.share[0], step, 1)
        search = self._fill(self._upload(searches), region, torch.tensor(sizes, dtype=torch.float32))
        yes = torch.ones(batch, dtype=torch.bool, device=self.device)
        pairs = Pairs(self._upload(templates), search, corners, yes, yes, aspect)
        return finish_pairs(pairs, target[places].to(self.device), self.augmentation, self.finishing)

    def _submit(self, batch: int, step: int) -> _Job:
        """Chooses targets, frames and windows of a batch, and has the threads cut them."""
        random = self.planning
        random.start(self.seed, self.share[0], step, 0)
        chosen = [self._choose(random) for _ in range(batch)]
        boxes = torch.from_numpy(np.array([boxes for _, boxes, _ in chosen], np.float32))
        plan = plan_windows(boxes[:, 0], boxes[:, 1], self.variant, self.augmentation, random)
        waiting = [self.threads.submit(self._cut, files, box, plan, i) for i, (files, box, _) in enumerate(chosen)]
        return plan, torch.tensor([target for *_, target in chosen], dtype=torch.int64), waiting

    def _choose(self, random: Random) -> Tuple[Tuple[Path, Path], np.ndarray, int]:
        """Chooses a target, a frame and, as published, a later one; returns files, boxes ``(2, 4)``, the target."""
        for _ in range(TRIES):
            which, target, first, second = random.uniform(4).tolist()
            number = int(which * len(self.datasets))
            dataset = self.datasets[number]
            rank, size = self.share if len(dataset) >= self.share[1] else (0, 1)
            ours = range(rank, len(dataset), size)
            index = ours[int(target * len(ours))]
            boxes, usable, frames = dataset.annotation(index)
            if not len(usable):
                continue
            one = int(usable[int(first * max(1, len(usable) - 1))])
            later = usable[(usable > one) & (usable <= one + self.augmentation.max_gap)]
            two = int(later[int(second * len(later))]) if len(later) else one
            return (frames[one], frames[two]), boxes[[one, two]], index * len(self.datasets) + number
        raise DatasetError(f"none of {TRIES} targets drawn is visible in any frame: check the annotations")

    def _cut(self, files: Tuple[Path, Path], boxes: np.ndarray, plan: Plan, i: int) -> _Crops:
        first = read_frame(files[0])
        frames = first, first if files[1] == files[0] else read_frame(files[1])
        out = [np.empty((size, size, 3), np.uint8) for size in (self.variant.template_size, self.variant.search_size)]
        for path, frame, (x, y, w, h), windows, crop in zip(files, frames, boxes, plan[:2], out):
            if not (-w < x < frame.shape[1] and -h < y < frame.shape[0]):
                raise DatasetError(f"the box lies outside the frame {printable(path)}: correct its annotation")
            crops.cut_one(frame, windows, i, crop, Cropper())
        return out[0], out[1], (frames[1].shape[1], frames[1].shape[0])

    def _upload(self, pictures: Sequence[np.ndarray]) -> Tensor:
        """BGR uint8 crops to RGB ``(B, 3, S, S)`` on the training device."""
        batch = torch.from_numpy(np.stack(pictures))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True).flip(-1).permute(0, 3, 1, 2)

    def _fill(self, search: Tensor, windows: Windows, sizes: Tensor) -> Tensor:
        """Shows the next pair's search crop where some of the crops leave their own picture."""
        if self.augmentation.fill <= 0:
            return search
        seen = crops.inside(windows, sizes, search.shape[-1]).to(self.device)
        seen |= (self.finishing.uniform(len(search)) >= self.augmentation.fill)[:, None, None, None]
        return torch.where(seen, search, search.roll(1, 0))


def _centre(box: Tensor) -> Tensor:
    return box[:, :2] + box[:, 2:] / 2
