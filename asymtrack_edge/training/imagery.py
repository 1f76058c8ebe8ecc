"""Training images held in memory as uint8, one canvas per image, ready to be cropped in batches.

``docs/training.md`` describes what a folder may hold: collections, annotated clips, images.
"""

from __future__ import annotations

import json
import os
import re
import tarfile
from collections import ChainMap, Counter
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass
from functools import lru_cache
from pathlib import Path
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Sequence, Set, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from asymtrack_edge import cli
from asymtrack_edge.datasets.sequences import SMALLEST_BOX, frames_of, read_boxes, read_labels
from asymtrack_edge.errors import DatasetError
from asymtrack_edge.files import IMAGE_SUFFIXES, decode_image, printable

TRUTH = re.compile(r"groundtruth(_rect(\.\d)?)?\.txt", re.IGNORECASE)
#: Files beside the ground truth that mark frames without the target (GOT-10k, LaSOT); in ``cover.label``, zero does.
ABSENT = ("absence.label", "cover.label", "full_occlusion.txt", "out_of_view.txt")

#: Kinds of target, the values of ``Pool.kind``.
CLIP, STILL = 0, 1
#: The index files of a collection, and the kind of their entries.
INDEXES = {"stills.json": STILL, "clips.json": CLIP}
#: Smallest side of a still's box that is used for training, in the original's pixels; on canvases, see SMALLEST_BOX.
SMALLEST_STILL = 10.0
#: How many of the files and sequences left out of a run are named.
TOLD = 20


class LeftOut(Set[str]):
    """The reasons why files and sequences were left out of training. The run reports their number at its end."""

    def tell(self, reason: str) -> None:
        """Adds a reason, and prints it if it is new and one of the first ``TOLD``; ``update`` prints nothing."""
        if reason not in self and len(self) < TOLD:
            cli.say(f"left out: {reason}")
        self.add(reason)


@dataclass
class Pool:
    """Images and targets on one device.

    A *target* is one object in one or more images: a track of a clip, or a box of a still (a track
    of length one). Targets are stored flat: target ``t`` owns the entries ``start[t]`` to
    ``start[t] + length[t]`` of ``image`` and ``box``. Integers are int64, other numbers float32.
    """

    canvases: Tensor  #: uint8 ``(N, S, S, 3)`` RGB, each image in the top-left corner, zeros elsewhere
    sizes: Tensor  #: ``(N, 2)`` width and height of each image
    group: Tensor  #: ``(N,)``; the frames of a clip are consecutive and share a number, other images have their own
    scenery: Tensor  #: ``(K,)``, the images that may serve as background and for arbitrary regions
    start: Tensor  #: ``(T,)``, like ``length`` and ``kind``
    length: Tensor
    kind: Tensor
    weight: Tensor  #: ``(T,)``, how often a target is drawn relative to others of its kind
    image: Tensor  #: ``(E,)`` index into ``canvases``
    box: Tensor  #: ``(E, 4)`` x, y, w, h in pixels

    def to(self, device: torch.device) -> Pool:
        return Pool(**{name: value.to(device) for name, value in vars(self).items()})

    def __len__(self) -> int:
        return len(self.start)


class _Item(NamedTuple):
    """A still or a clip that has not been read yet."""

    kind: int  #: ``CLIP`` or ``STILL``
    source: str  #: where it comes from; targets of one source share its weight
    images: Sequence[Any]  #: its image files: paths, or names in a shard
    read: Callable[[Any], bytes]  #: returns the content of one of them
    tracks: Sequence[np.ndarray] = ()  #: for each target, one box per image ``(N, 4)``; nan where unknown


def load_pool(
    folders: Sequence[Path], side: int = 320, share: Tuple[int, int] = (0, 1), left_out: Optional[LeftOut] = None
) -> Pool:
    """Loads folders and all their subfolders into memory.

    Images larger than ``side`` pixels are shrunk. ``share`` is this process's number and the number of processes: each
    reads every n-th still and clip. ``left_out`` gets what is damaged, and why. Raises DatasetError if nothing is left.
    """
    left_out = LeftOut() if left_out is None else left_out
    items = [item for folder in folders for item in _find(folder, left_out)]
    if not any(item.images for item in items):
        raise DatasetError(f"{', '.join(map(str, folders))}: no image and no annotated or labelled clip to train on")
    rank, size = share
    # A handful of items is not worth dividing, and could leave a process with nothing.
    items = items[rank::size] if len(items) >= 8 * size else items
    counts = [len(item.images) for item in items]
    ends = np.cumsum(counts)
    # Untouched pages of zeros take no memory: only the area covered by images does.
    canvases = np.zeros((ends[-1], side, side, 3), np.uint8)
    sizes, scales = np.zeros((ends[-1], 2), np.float32), np.zeros(ends[-1])

    def store(item: _Item, end: int) -> bool:
        try:
            for i, name in enumerate(item.images, start=end - len(item.images)):
                decoded = decode_image(np.frombuffer(item.read(name), np.uint8))
                if decoded is None:
                    raise DatasetError(f"cannot decode the training image {printable(name)}: remove or replace it")
                image, scales[i] = shrink(decoded, side)
                canvases[i, : len(image), : image.shape[1]], sizes[i] = image[..., ::-1], image.shape[1::-1]
        except (DatasetError, OSError) as error:
            left_out.tell(str(error))
            return False
        return True

    with ThreadPoolExecutor(min(16, os.cpu_count() or 1)) as threads:
        whole = list(cli.progress(threads.map(store, items, ends), "imagery", len(items)))
    if not any(good and item.images for item, good in zip(items, whole)):
        raise DatasetError("no image can be read: nothing to train on")
    # For each object: its item, the indices of the images that show it, and its boxes in canvas pixels.
    targets: List[Tuple[_Item, np.ndarray, np.ndarray]] = []
    for item, end, good in zip(items, ends, whole):
        first = end - len(item.images)
        smallest = SMALLEST_STILL if item.kind == STILL else 0.0
        for boxes in item.tracks if good else ():
            scaled = boxes * scales[first:end, None]
            large = (boxes[:, 2:].min(1) >= smallest) & (scaled[:, 2:].min(1) >= SMALLEST_BOX)
            inside = (scaled[:, :2] < sizes[first:end]).all(1) & (scaled[:, :2] + scaled[:, 2:] > 0).all(1)
            known = large & inside & np.isfinite(boxes).all(1)
            if known.any():
                targets.append((item, first + np.flatnonzero(known), scaled[known]))
    if not targets and any(good and np.isfinite(b).any() for item, good in zip(items, whole) for b in item.tracks):
        advice = "give a larger --canvas, or correct the boxes (docs/training.md)"
        raise DatasetError(f"every box lies outside its image or is too small at --canvas {side}: {advice}")
    lengths = np.array([len(images) for _, images, _ in targets], np.int64)
    # A source's share is proportional to the square root of its number of targets.
    count = Counter((item.kind, item.source) for item, *_ in targets)
    return Pool(
        canvases=torch.from_numpy(canvases),
        sizes=torch.from_numpy(sizes),
        group=torch.from_numpy(np.repeat(np.arange(len(items)), counts)),
        scenery=torch.from_numpy(np.flatnonzero(np.repeat(whole, counts))),
        start=torch.from_numpy(np.cumsum(lengths) - lengths),
        length=torch.from_numpy(lengths),
        kind=torch.tensor([item.kind for item, *_ in targets], dtype=torch.int64),
        weight=torch.tensor([count[item.kind, item.source] ** -0.5 for item, *_ in targets]),
        image=torch.from_numpy(np.concatenate([np.zeros(0, np.int64), *(images for _, images, _ in targets)])),
        box=torch.from_numpy(np.concatenate([np.zeros((0, 4)), *(boxes for *_, boxes in targets)])).float(),
    )


def files_under(folder: Path) -> List[Path]:
    """All visible files below ``folder``, sorted; raises ``DatasetError`` if there is no such folder."""
    if not folder.is_dir():
        raise DatasetError(f"there is no folder {printable(folder)}")
    found: List[Path] = []
    seen: Set[str] = set()
    for place, folders, names in os.walk(folder, followlinks=True):  # rglob skips folders that are links
        new = os.path.realpath(place) not in seen  # else a circular link, or a second link
        seen.add(os.path.realpath(place))
        # Sorted, because all processes of a run must find the same files in the same order.
        folders[:] = sorted(name for name in folders if new and not name.startswith("."))
        found += [Path(place, name) for name in names if new and not name.startswith(".")]
    return sorted(path for path in found if path.is_file())


def _boxes(truth: Path, count: int) -> np.ndarray:
    """The boxes of a target in a clip of ``count`` images ``(count, 4)``; nan where unknown or absent."""
    table = read_boxes(truth)
    if len(table) != count:
        raise DatasetError(f"{printable(truth)} has {len(table)} boxes for {count} images")
    for label in (truth.with_name(name) for name in ABSENT if truth.with_name(name).is_file()):
        marks = read_labels(label)
        if len(marks) != count:
            raise DatasetError(f"{printable(label)} has {len(marks)} labels for {count} images")
        table[(marks > 0) != (label.name == "cover.label")] = np.nan
    table[:, :2] -= "_rect" in truth.name.lower()  # such files count pixels from 1
    return table


def _find(folder: Path, left_out: LeftOut) -> Iterator[_Item]:
    """The items in a folder, not yet read: collections, annotated clips and, outside both, images."""
    files = files_under(folder)
    collections = {path.parent for path in files if path.name in INDEXES}
    by_clip: Dict[Path, List[Path]] = {}  # the box files of each clip, one per target
    for path in files:
        if TRUTH.fullmatch(path.name) and collections.isdisjoint(path.parents):
            by_clip.setdefault(path.parent, []).append(path)
    taken = collections.union(by_clip)
    for place in sorted(collections):
        yield from _collection(place)
    for place, truths in by_clip.items():
        frames, tracks = frames_of(place), []
        for truth in (path for path in truths if len(truths) == 1 or path.read_bytes().strip()):  # OTB's Human4
            try:
                tracks.append(_boxes(truth, len(frames)))
            except DatasetError as error:
                left_out.tell(str(error))
        if tracks:
            yield _Item(CLIP, "", list(frames), Path.read_bytes, tracks)
    for path in files:
        if path.name.lower().endswith(IMAGE_SUFFIXES) and taken.isdisjoint(path.parents):
            yield _Item(STILL, "", [path], Path.read_bytes)


def _collection(folder: Path) -> Iterator[_Item]:
    # Only the file name of a shard is used, so that an index cannot reach outside its own folder.
    shard = lru_cache(maxsize=None)(lambda name: _read_tar(folder / Path(str(name)).name))
    records = [(kind, record) for name, kind in INDEXES.items() for record in read_records(folder / name)]
    try:
        for kind, record in records:
            if kind == CLIP:
                names, tracks = record["frames"], [track["boxes"] for track in record["tracks"]]
            else:
                names, tracks = [record["file"]], [[box] for box in record["boxes"]]
            shards = record["shard"] if isinstance(record["shard"], list) else [record["shard"]]
            files = ChainMap(*map(shard, shards))
            content = {name: files[name] for name in names}
            tables = [np.array([box or [np.nan] * 4 for box in boxes], np.float64) for boxes in tracks]
            if any(table.shape != (len(names), 4) for table in tables):
                raise ValueError
            # Text after a colon distinguishes files of the same source; they share its weight.
            source = record.get("source", "").split(":")[0]
            yield _Item(kind, source, names, content.__getitem__, tables)
    except KeyError as error:
        raise DatasetError(f"the collection in {folder} lacks {error}") from None
    except (AttributeError, OverflowError, TypeError, ValueError):
        what = "boxes are not x, y, w, h for each image, or a source is not text"
        raise DatasetError(f"cannot read the collection in {folder}: {what}") from None


def read_records(path: Path) -> List[Dict[str, Any]]:
    """Reads an index of a collection, empty if there is no such file; raises ``DatasetError`` if it is no list."""
    try:
        records = json.loads(path.read_text(encoding="utf-8")) if path.exists() else []
    except (RecursionError, ValueError) as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path} is not a list of records")
    return records


def _read_tar(path: Path) -> Dict[str, bytes]:
    try:
        with tarfile.open(path, "r:") as archive:
            files = ((m.name, archive.extractfile(m)) for m in archive if m.isfile() and not m.issparse())
            return {name: file.read() for name, file in files if file is not None}
    except (MemoryError, OSError, OverflowError, RecursionError, tarfile.TarError) as error:
        raise DatasetError(f"cannot read the shard {path}: {str(error) or 'it claims too much memory'}") from None


def shrink(image: np.ndarray, side: int) -> Tuple[np.ndarray, float]:
    """Shrinks an image to at most ``side`` pixels on its long side; returns it and the scale factor."""
    scale = min(1.0, side / max(image.shape[:2]))
    if scale == 1:
        return image, scale
    width, height = (max(1, round(v * scale)) for v in image.shape[1::-1])
    return cv2.resize(image, (width, height), interpolation=cv2.INTER_AREA), scale
