"""Training imagery held in memory as uint8: one canvas an image, ready to be cropped in batches.

``docs/training.md`` says what a folder may hold: a collection, annotated clips, images.
"""

from __future__ import annotations

import json
import os
import tarfile
from collections import Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, List, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from asymtrack_edge.datasets.sequences import Frames, read_boxes
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.files import printable
from asymtrack_edge.training.log import Progress, silent

INDEXES = ("stills.json", "clips.json", "cutouts.json")
TRUTHS = ("groundtruth.txt", "groundtruth_rect.txt")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

#: Kinds of target, the values of ``Pool.kind``.
CLIP, STILL = 0, 1
#: Smallest box that is learnt from, per side: in canvas pixels, and for stills in the image's own.
SMALLEST_BOX, SMALLEST_STILL = 4.0, 10.0
#: Items decoded at a time, so that few images are held twice.
CHUNK = 64

Box = Sequence[float]


@dataclass
class Pool:
    """Images and targets on one device.

    A *target* is one object in one or more images: a track of a clip, or a box of a still (a track
    of length one). Targets are stored flat: target ``t`` owns the entries ``start[t]`` to
    ``start[t] + length[t]`` of ``image`` and ``box``. Whole numbers are int64, others float32.
    """

    canvases: Tensor  #: uint8 ``(N, S, S, 3)`` RGB, each image in the top-left corner, zeros elsewhere
    sizes: Tensor  #: ``(N, 2)`` width and height of each image
    still: Tensor  #: ``(N,)``; the frames of a clip follow each other and share a number, other images have their own
    scenery: Tensor  #: ``(K,)``, the images that may serve as background and for arbitrary regions
    start: Tensor  #: ``(T,)``, as ``length`` and ``kind``
    length: Tensor
    kind: Tensor
    weight: Tensor  #: ``(T,)``, how often a target is drawn relative to others of its kind
    image: Tensor  #: ``(E,)`` index into ``canvases``
    box: Tensor  #: ``(E, 4)`` x, y, w, h in pixels
    cutouts: Tensor  #: uint8 ``(M, C, C, 4)`` RGBA, cropped tight, in the top-left corner
    cutout_sizes: Tensor  #: ``(M, 2)``

    def to(self, device: torch.device) -> Pool:
        """Moves everything to ``device``."""
        return Pool(**{name: value.to(device) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.start)

    def groups(self) -> Tensor:
        """``(T,)``, which still or clip each target is of, as numbered in ``still``."""
        return self.still[self.image[self.start]]

    def split(self, every: int = 50) -> Tuple[Pool, Pool]:
        """All but every ``every``-th still or clip, and those, for validation: targets and scenery, not imagery."""
        held, held_scenery = (g % every == every - 1 for g in (self.groups(), self.still[self.scenery]))
        return self._only(~held, ~held_scenery), self._only(held, held_scenery)

    def _only(self, targets: Tensor, scenery: Tensor) -> Pool:
        parts = {name: getattr(self, name)[targets] for name in ("start", "length", "kind", "weight")}
        return Pool(**{**vars(self), **parts, "scenery": self.scenery[scenery]})


#: Name and reader of an image file.
_File = Tuple[str, Callable[[], bytes]]


class _Item(NamedTuple):
    """A still, a clip or a cut-out that is yet to be read."""

    kind: Optional[int]  #: ``CLIP``, ``STILL`` or None for a cut-out
    source: str  #: where it comes from; targets of one source share its weight
    images: List[_File]
    tracks: List[List[Optional[Box]]]  #: per target a box for each image, or None where unknown


@dataclass
class _Builder:
    """Collects images and targets straight into canvases."""

    side: int
    canvases: np.ndarray
    sizes: List[Tuple[int, int]] = field(default_factory=list)
    stills: List[int] = field(default_factory=list)
    targets: List[Tuple[int, str, List[int], List[Box]]] = field(default_factory=list)
    cutouts: List[np.ndarray] = field(default_factory=list)

    def add(self, item: _Item, images: Sequence[np.ndarray]) -> None:
        """Stores a still, a clip or a cut-out whose decoded images are RGB or RGBA."""
        transparent = images[0].shape[2] == 4 and (images[0][..., 3] < 128).mean() > 0.02
        if item.kind is None or (transparent and not item.tracks and item.kind == STILL):
            self._add_cutout(item, images[0])
            return
        first, number = len(self.sizes), self.stills[-1] + 1 if self.stills else 0
        scales = [self._add_image(image, number) for image in images]
        for boxes in item.tracks:
            known = [
                (first + i, [v * scale for v in box])
                for i, (box, scale) in enumerate(zip(boxes, scales))
                if box is not None
                and min(box[2:]) * scale >= SMALLEST_BOX
                and (item.kind == CLIP or min(box[2:]) >= SMALLEST_STILL)
            ]
            if known:
                self.targets.append((item.kind, item.source, [k[0] for k in known], [k[1] for k in known]))

    def _add_image(self, image: np.ndarray, still: int) -> float:
        """Stores an image, shrunk where it exceeds the canvas; returns its scale."""
        image = np.ascontiguousarray(image[..., :3])
        scale = min(1.0, self.side / max(image.shape[:2]))
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)[: self.side, : self.side]
        height, width = image.shape[:2]
        self.canvases[len(self.sizes), :height, :width] = image
        self.sizes.append((width, height))
        self.stills.append(still)
        return scale

    def _add_cutout(self, item: _Item, image: np.ndarray) -> None:
        """Stores what is not transparent, no larger than half a canvas."""
        if image.shape[2] != 4:
            raise DatasetError(f"{item.images[0][0]} has no alpha channel")
        ys, xs = np.nonzero(image[..., 3] > 127)
        if not len(xs):
            return
        tight = image[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
        scale = min(1.0, 0.5 * self.side / max(tight.shape[:2]))
        if scale < 1:
            width, height = (max(1, round(v * scale)) for v in tight.shape[1::-1])
            tight = cv2.resize(tight, (width, height), interpolation=cv2.INTER_AREA)
        self.cutouts.append(np.ascontiguousarray(tight))

    def build(self) -> Pool:
        """Lays everything out as tensors."""
        side = max([max(c.shape[:2]) for c in self.cutouts], default=1)
        cutouts = np.zeros((len(self.cutouts), side, side, 4), np.uint8)
        for target, cutout in zip(cutouts, self.cutouts):
            target[: cutout.shape[0], : cutout.shape[1]] = cutout
        lengths = np.array([len(t[2]) for t in self.targets], np.int64)
        # A source with many targets is drawn more often, but not in proportion: square root.
        count = Counter(target[:2] for target in self.targets)
        return Pool(
            canvases=torch.from_numpy(self.canvases[: len(self.sizes)]),
            sizes=torch.tensor(self.sizes, dtype=torch.float32),
            still=torch.tensor(self.stills, dtype=torch.int64),
            scenery=torch.arange(len(self.sizes)),
            start=torch.from_numpy(np.cumsum(lengths) - lengths),
            length=torch.from_numpy(lengths),
            kind=torch.tensor([t[0] for t in self.targets], dtype=torch.int64),
            weight=torch.tensor([count[target[:2]] ** -0.5 for target in self.targets]),
            image=torch.tensor([i for t in self.targets for i in t[2]], dtype=torch.int64),
            box=torch.tensor([b for t in self.targets for b in t[3]], dtype=torch.float32).view(-1, 4),
            cutouts=torch.from_numpy(cutouts),
            cutout_sizes=torch.tensor([c.shape[1::-1] for c in self.cutouts], dtype=torch.float32).view(-1, 2),
        )


def load_pool(
    folders: Sequence[Path], side: int = 320, progress: Progress = silent, share: Tuple[int, int] = (0, 1)
) -> Pool:
    """Loads folders, searched with all folders below them, into memory.

    Images larger than ``side`` pixels are shrunk. ``share`` is the number of this process and how many there are: each
    reads every n-th still and clip. DatasetError where a file is missing or unreadable, or nothing is to train on.
    """
    items = [item for folder in folders for item in _find(folder)]
    rank, size = share
    # A handful is not worth dividing, and would leave a process with nothing.
    if sum(item.kind is not None for item in items) >= 8 * size:
        items = [item for i, item in enumerate(items) if item.kind is None or i % size == rank]
    count = sum(len(item.images) for item in items if item.kind is not None)
    if not count:
        names = ", ".join(map(str, folders))
        raise DatasetError(f"{names}: no collection, no annotated clip and no image is here; nothing to train on")
    # Untouched pages of zeros cost nothing, so memory follows what the images cover.
    builder = _Builder(side, np.zeros((count, side, side, 3), np.uint8))
    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        for first in progress(range(0, len(items), CHUNK), "imagery"):
            chunk = items[first : first + CHUNK]
            for item, images in zip(chunk, threads.map(_decode, chunk)):
                builder.add(item, images)
    if not builder.sizes:
        raise DatasetError("there are cut-outs only: add images to lay them on")
    return builder.build()


def _decode(item: _Item) -> List[np.ndarray]:
    return [decode_image(read(), name) for name, read in item.images]


def _find(folder: Path) -> List[_Item]:
    """What a folder holds, unread."""
    if is_collection(folder):
        return _collection_items(folder)
    truths = files_under(folder, TRUTHS)
    inside = {path.parent for path in truths}
    files = [f for f in files_under(folder, IMAGE_SUFFIXES) if not inside & set(f.parents)]
    return [_annotated_clip(path) for path in truths] + [_Item(STILL, "", [_file(path)], []) for path in files]


def _file(path: Path) -> _File:
    return printable(path), path.read_bytes


def _annotated_clip(truth: Path) -> _Item:
    frames = Frames(truth.parent) if len(Frames(truth.parent)) else Frames(truth.parent / "img")
    table = read_boxes(truth)
    if len(table) != len(frames):
        raise DatasetError(f"{printable(truth)} has {len(table)} boxes for {len(frames)} images")
    table[:, :2] -= truth.name == TRUTHS[1]  # counts pixels from 1
    boxes = [row.tolist() if np.isfinite(row).all() else None for row in table]
    return _Item(CLIP, "", [_file(path) for path in frames], [boxes])


def is_collection(folder: Path) -> bool:
    """Whether ``folder`` has an index of the collection format."""
    return any((folder / name).is_file() for name in INDEXES)


def files_under(folder: Path, endings: Sequence[str]) -> List[Path]:
    """All visible files below ``folder`` whose names end so, sorted; DatasetError if there is no such folder."""
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {folder}: check --data")
    found = (p for p in folder.rglob("*") if p.name.lower().endswith(tuple(endings)) and p.is_file())
    return sorted(p for p in found if not p.name.startswith("."))


def _collection_items(folder: Path) -> List[_Item]:
    stills, clips, cutouts = (_records(folder / name) for name in INDEXES)
    tars: Dict[str, Dict[str, bytes]] = {}

    def images(record: Dict[str, Any], names: Sequence[str]) -> List[_File]:
        shards = record["shard"] if isinstance(record["shard"], list) else [record["shard"]]
        for shard in shards:
            if shard not in tars:
                # Only the name counts: an index cannot reach outside its own folder.
                tars[shard] = _read_tar(folder / Path(str(shard)).name)
        found = [next((tars[shard][name] for shard in shards if name in tars[shard]), None) for name in names]
        if None in found:
            raise DatasetError(f"{shards} in {folder} holds no {names[found.index(None)]}")
        return [(name, partial(bytes, data)) for name, data in zip(names, found)]

    try:
        items = [
            _Item(STILL, r.get("source", ""), images(r, [r["file"]]), [[box] for box in r["boxes"]]) for r in stills
        ]
        for r in clips:
            # What follows a colon tells files of one origin apart; they share its weight.
            source = r.get("source", "").split(":")[0]
            items.append(_Item(CLIP, source, images(r, r["frames"]), [track["boxes"] for track in r["tracks"]]))
        return items + [_Item(None, "", images(r, [r["file"]]), []) for r in cutouts]
    except KeyError as error:
        raise DatasetError(f"a record of the collection in {folder} has no {error}") from None


def _records(path: Path) -> List[Dict[str, Any]]:
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path} is not a list of records")
    return records


def _read_tar(path: Path) -> Dict[str, bytes]:
    try:
        with tarfile.open(path) as archive:
            files = ((m.name, archive.extractfile(m)) for m in archive if m.isfile())
            return {name: file.read() for name, file in files if file is not None}
    except (OSError, tarfile.TarError) as error:
        raise DatasetError(f"cannot read the shard {path}: {error}") from None


def decode_image(data: bytes, name: str) -> np.ndarray:
    """Decodes an image file's bytes to uint8 RGB ``(H, W, 3)``, or RGBA with alpha; DatasetError if it is no image."""
    # A photograph is turned upright as it says; only other formats have an alpha channel.
    flags = cv2.IMREAD_COLOR if data[:2] == b"\xff\xd8" else cv2.IMREAD_UNCHANGED
    image: Optional[np.ndarray] = cv2.imdecode(np.frombuffer(data, np.uint8), flags) if data else None
    if image is None:
        raise DatasetError(f"cannot decode the training image {name}: remove or replace the file")
    if image.dtype != np.uint8:
        image = cv2.convertScaleAbs(image, alpha=255 / np.iinfo(image.dtype).max if image.dtype.kind == "u" else 255)
    if image.ndim == 2:
        return cv2.cvtColor(image, cv2.COLOR_GRAY2RGB)
    return cv2.cvtColor(image, cv2.COLOR_BGRA2RGBA if image.shape[2] == 4 else cv2.COLOR_BGR2RGB)
