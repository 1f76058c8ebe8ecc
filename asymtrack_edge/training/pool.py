"""Training imagery held in memory as uint8, in one canvas per image, ready to be cropped in batches.

Folder format ("collection"): any of ``stills.json``, ``clips.json`` and ``cutouts.json``, each a
list of records naming images inside the tar file ``record["shard"]`` beside it:

* stills: ``file``, ``boxes`` (list of x, y, w, h in pixels; may be empty), ``source``
* clips: ``frames`` (list of files), ``tracks`` (list of ``{"boxes": [...], "kind": "gt" | "pseudo"}``,
  one box per frame, null where unknown), ``source``
* cutouts: ``file`` of an image with an alpha channel
"""

from __future__ import annotations

import json
import tarfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, List, Optional, Sequence, Tuple

import cv2
import numpy as np
import torch
from torch import Tensor

from asymtrack_edge.errors import DatasetError

#: Kinds of target, in the order of ``Pool.kinds``.
CLIP, STILL = 0, 1


@dataclass
class Pool:
    """Images and targets on one device.

    A *target* is one object in one or more images: a track of a clip, or a box of a still (a track
    of length one). Targets are stored flat: target ``t`` owns the entries ``start[t]`` to
    ``start[t] + length[t]`` of ``image`` and ``box``.

    Attributes:
        canvases: uint8 ``(N, 3, S, S)`` RGB, each image in the top-left corner, zeros elsewhere.
        sizes: float32 ``(N, 2)`` width and height of each image.
        start, length, kind: int64 ``(T,)``.
        weight: float32 ``(T,)``, how often a target is drawn relative to others of its kind.
        image: int64 ``(E,)`` index into ``canvases``.
        box: float32 ``(E, 4)`` x, y, w, h in pixels.
        cutouts: uint8 ``(M, 4, C, C)`` RGBA, cropped tight, in the top-left corner.
        cutout_sizes: float32 ``(M, 2)``.
    """

    canvases: Tensor
    sizes: Tensor
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


class _Builder:
    """Collects images and targets, then lays them out as a ``Pool``."""

    def __init__(self, side: int) -> None:
        self.side = side
        self.images: List[np.ndarray] = []
        self.targets: List[Tuple[int, str, List[int], List[Sequence[float]]]] = []
        self.cutouts: List[np.ndarray] = []

    def add_image(self, image: np.ndarray) -> Tuple[int, float]:
        """Stores an RGB image, shrunk where it exceeds the canvas; returns its index and scale."""
        scale = min(1.0, self.side / max(image.shape[:2]))
        if scale < 1:
            image = cv2.resize(image, None, fx=scale, fy=scale, interpolation=cv2.INTER_AREA)
        self.images.append(image[: self.side, : self.side])
        return len(self.images) - 1, scale

    def build(self) -> Pool:
        canvases = np.zeros((max(1, len(self.images)), 3, self.side, self.side), np.uint8)
        sizes = np.ones((len(canvases), 2), np.float32)
        for i, image in enumerate(self.images):
            height, width = image.shape[:2]
            canvases[i, :, :height, :width] = image.transpose(2, 0, 1)
            sizes[i] = width, height
        cutout_side = max([max(c.shape[:2]) for c in self.cutouts], default=1)
        cutouts = np.zeros((len(self.cutouts), 4, cutout_side, cutout_side), np.uint8)
        cutout_sizes = np.ones((len(self.cutouts), 2), np.float32)
        for i, cutout in enumerate(self.cutouts):
            height, width = cutout.shape[:2]
            cutouts[i, :, :height, :width] = cutout.transpose(2, 0, 1)
            cutout_sizes[i] = width, height
        lengths = [len(t[2]) for t in self.targets]
        per_source: Dict[Tuple[int, str], int] = {}
        for kind, source, _, _ in self.targets:
            per_source[kind, source] = per_source.get((kind, source), 0) + 1
        # A source with many targets is drawn more often, but not in proportion: square root.
        weight = [per_source[kind, source] ** -0.5 for kind, source, _, _ in self.targets]
        return Pool(
            canvases=torch.from_numpy(canvases),
            sizes=torch.from_numpy(sizes),
            start=torch.tensor(np.cumsum([0, *lengths])[:-1].astype(np.int64)),
            length=torch.tensor(lengths, dtype=torch.int64),
            kind=torch.tensor([t[0] for t in self.targets], dtype=torch.int64),
            weight=torch.tensor(weight, dtype=torch.float32),
            image=torch.tensor([i for t in self.targets for i in t[2]], dtype=torch.int64),
            box=torch.tensor([b for t in self.targets for b in t[3]], dtype=torch.float32).reshape(-1, 4),
            cutouts=torch.from_numpy(cutouts),
            cutout_sizes=torch.from_numpy(cutout_sizes),
        )


def decode_rgb(data: bytes, name: str) -> np.ndarray:
    """Decodes an image file's bytes to uint8 RGB ``(H, W, 3)``.

    Raises:
        DatasetError: the bytes are no image.
    """
    image = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_COLOR)
    if image is None:
        raise DatasetError(f"cannot decode the training image {name}")
    return cv2.cvtColor(image, cv2.COLOR_BGR2RGB)


class _Shards:
    """Reads members of the tar files beside a collection's JSON, each tar opened once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: Dict[str, Dict[str, bytes]] = {}

    def read(self, shard: Any, name: str) -> bytes:
        """Bytes of ``name`` in ``shard``, a file name or a list of those to look through."""
        if isinstance(shard, list):
            for one in shard[:-1]:
                if name in self._load(one):
                    return self.files[one][name]
            shard = shard[-1]
        try:
            return self._load(shard)[name]
        except KeyError:
            raise DatasetError(f"{shard} in {self.folder} holds no {name}") from None

    def _load(self, shard: str) -> Dict[str, bytes]:
        if shard not in self.files:
            path = self.folder / Path(shard).name
            try:
                with tarfile.open(path) as archive:
                    self.files[shard] = {m.name: archive.extractfile(m).read() for m in archive if m.isfile()}  # type: ignore[union-attr]
            except (OSError, tarfile.TarError) as error:
                raise DatasetError(f"cannot read the shard {path}: {error}") from None
        return self.files[shard]


def _records(folder: Path, name: str) -> List[Dict[str, Any]]:
    path = folder / name
    if not path.exists():
        return []
    try:
        return json.loads(path.read_text())
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None


def _tracked_runs(boxes: Sequence[Optional[Sequence[float]]]) -> Iterator[int]:
    """Indices of the frames whose box is known and large enough to be seen."""
    for i, box in enumerate(boxes):
        if box is not None and min(box[2:]) >= 4:
            yield i


def load_collection(folder: Path, side: int = 320, limit: Optional[int] = None) -> Pool:
    """Loads a collection (see the module's docstring) into memory.

    Args:
        folder: where the JSON files and tars are.
        side: canvas side in pixels; larger images are shrunk to it.
        limit: at most this many records of each file, for a rehearsal.

    Raises:
        DatasetError: a file is missing, unreadable, or there is nothing to train on.
    """
    shards = _Shards(folder)
    builder = _Builder(side)
    for record in _records(folder, "stills.json")[:limit]:
        index, scale = builder.add_image(decode_rgb(shards.read(record["shard"], record["file"]), record["file"]))
        for box in record["boxes"]:
            if min(box[2:]) >= 10:
                builder.targets.append((STILL, record["source"], [index], [[v * scale for v in box]]))
    for record in _records(folder, "clips.json")[:limit]:
        frames = [builder.add_image(decode_rgb(shards.read(record["shard"], f), f)) for f in record["frames"]]
        source = record["source"].split(":")[0]
        for track in record["tracks"]:
            use = list(_tracked_runs(track["boxes"]))
            if use:
                boxes = [[v * frames[i][1] for v in track["boxes"][i]] for i in use]
                builder.targets.append((CLIP, source, [frames[i][0] for i in use], boxes))
    for record in _records(folder, "cutouts.json")[:limit]:
        data = shards.read(record["shard"], record["file"])
        cutout = cv2.imdecode(np.frombuffer(data, np.uint8), cv2.IMREAD_UNCHANGED)
        if cutout is None or cutout.ndim != 3 or cutout.shape[2] != 4:
            raise DatasetError(f"{record['file']} has no alpha channel")
        ys, xs = np.nonzero(cutout[..., 3] > 127)
        if len(xs):
            tight = cutout[ys.min() : ys.max() + 1, xs.min() : xs.max() + 1]
            builder.cutouts.append(cv2.cvtColor(tight, cv2.COLOR_BGRA2RGBA))
    if not builder.images:
        raise DatasetError(f"{folder} holds no stills.json or clips.json with images: nothing to train on")
    return builder.build()
