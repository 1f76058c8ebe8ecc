"""Pairs from data sets too large for memory: frames are read, decoded and cut by threads, ahead.

The windows are chosen by the same code as for a ``Pool``, from annotations alone, before any frame
is opened. A thread then decodes a frame and cuts the window out of it at full resolution, with the
tracker's own arithmetic, and only the finished uint8 crops go to the training device, where
everything else happens in batches.
"""

from __future__ import annotations

import os
from concurrent.futures import Future, ThreadPoolExecutor
from dataclasses import dataclass
from pathlib import Path
from typing import Dict, List, Optional, Sequence, Tuple

import numpy as np
import torch
from torch import Tensor

from asymtrack_edge.datasets import Dataset
from asymtrack_edge.datasets.sequences import read_frame
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.geometry import Cropper
from asymtrack_edge.training.crops import Augmentation, Random, Windows, cut_one, inside
from asymtrack_edge.training.pairs import Pairs, Plan, finish_pairs, plan_windows
from asymtrack_edge.variants import Variant

#: Batches that are prepared while one is learnt from.
AHEAD = 3
#: Draws before giving up finding a target that is visible somewhere.
TRIES = 100

#: Template, search crop and the search frame's width and height of a pair.
_Crops = Tuple[np.ndarray, np.ndarray, Tuple[int, int]]
#: A batch on its way: its windows, which target each pair shows ``(B,)``, and its crops.
_Job = Tuple[Plan, Tensor, "List[Future[_Crops]]"]


@dataclass
class DiskPairs:
    """Draws augmented pairs from data sets on disk, in equal parts; seed, process and step decide which."""

    datasets: Sequence[Dataset]  #: at least one
    variant: Variant  #: gives crop sizes and factors
    augmentation: Augmentation
    device: torch.device  #: where the batches go
    seed: int = 0
    #: Number of this process and how many there are: each draws every n-th target of its own.
    share: Tuple[int, int] = (0, 1)
    workers: Optional[int] = None  #: threads that read and decode; by default one per processor, 16 at most

    def __post_init__(self) -> None:
        self.planning, self.finishing = Random(torch.device("cpu")), Random(self.device)
        self.threads = ThreadPoolExecutor(self.workers or min(16, os.cpu_count() or 1))
        self.jobs: Dict[Tuple[int, int], _Job] = {}

    def draw(self, batch: int, step: int) -> Pairs:
        """Makes the ``batch`` pairs of ``step``.

        Raises:
            DatasetError: a frame or an annotation cannot be read.
        """
        wanted = [(batch, step + i) for i in range(AHEAD + 1)]
        self.jobs = {key: self.jobs.get(key) or self._submit(*key) for key in wanted}
        plan, which, crops = self.jobs.pop((batch, step))
        templates, searches, sizes = zip(*(future.result() for future in crops))
        template, search = self._upload(templates), self._upload(searches)
        self.finishing.start(self.seed, self.share[0], step, 1)
        search = self._fill(search, plan.search, torch.tensor(sizes, dtype=torch.float32))
        corners, identity = plan.corners.to(self.device), which.to(self.device)
        known = torch.ones_like(identity, dtype=torch.bool)
        return finish_pairs(template, search, corners, identity, known, self.augmentation, self.finishing)

    def _submit(self, batch: int, step: int) -> _Job:
        """Chooses targets, frames and windows of a batch, and lets the threads cut them."""
        random = self.planning
        random.start(self.seed, self.share[0], step, 0)
        chosen = [self._choose(random) for _ in range(batch)]
        boxes = torch.from_numpy(np.array([boxes for _, boxes, _ in chosen], np.float32))
        plan = plan_windows(boxes[:, 0], boxes[:, 1], self.variant, self.augmentation, random)
        crops = [self.threads.submit(self._cut, files, plan, i) for i, (files, *_) in enumerate(chosen)]
        return plan, torch.tensor([which for *_, which in chosen], dtype=torch.int64), crops

    def _choose(self, random: Random) -> Tuple[Tuple[Path, Path], np.ndarray, int]:
        """Files, boxes ``(2, 4)`` and target of a pair: a data set, a target of it, two frames not too far apart."""
        for _ in range(TRIES):
            which, target, first, second = random.uniform(4).tolist()
            number = int(which * len(self.datasets))
            dataset = self.datasets[number]
            rank, size = self.share if len(dataset) >= self.share[1] else (0, 1)
            index = int(target * len(range(rank, len(dataset), size))) * size + rank
            boxes, usable, frames = dataset.annotation(index)
            if not len(usable):
                continue
            one = int(usable[int(first * len(usable))])
            near = usable[np.abs(usable - one) <= self.augmentation.max_gap]
            two = int(near[int(second * len(near))])
            return (frames[one], frames[two]), boxes[[one, two]], index * len(self.datasets) + number
        raise DatasetError(f"none of {TRIES} targets drawn is visible in any frame: check the annotations")

    def _cut(self, files: Tuple[Path, Path], plan: Plan, i: int) -> _Crops:
        cropper = Cropper()
        first = read_frame(files[0])
        second = first if files[1] == files[0] else read_frame(files[1])
        template = np.empty((self.variant.template_size,) * 2 + (3,), np.uint8)
        search = np.empty((self.variant.search_size,) * 2 + (3,), np.uint8)
        cut_one(first, plan.template, i, template, cropper)
        cut_one(second, plan.search, i, search, cropper)
        return template, search, (second.shape[1], second.shape[0])

    def _upload(self, crops: Sequence[np.ndarray]) -> Tensor:
        """BGR uint8 crops to RGB ``(B, 3, S, S)`` on the training device."""
        batch = torch.from_numpy(np.stack(crops))
        if self.device.type == "cuda":
            batch = batch.pin_memory()
        return batch.to(self.device, non_blocking=True).flip(-1).permute(0, 3, 1, 2)

    def _fill(self, search: Tensor, windows: Windows, sizes: Tensor) -> Tensor:
        """Shows the next pair's search crop where some of the crops leave their picture."""
        share = self.augmentation.fill
        if share <= 0:
            return search
        seen = inside(windows, sizes, search.shape[-1]).to(self.device)
        seen |= (self.finishing.uniform(len(search)) >= share)[:, None, None, None]
        return torch.where(seen, search, search.roll(1, 0))
