"""Loads imagery into a pool: a collection, a folder of images.

A *collection* is a folder with any of ``stills.json``, ``clips.json`` and ``cutouts.json``, each a
list of records naming images inside the tar file ``record["shard"]`` (or a list of tars) beside it:

* stills: ``file``, ``boxes`` (list of x, y, w, h in pixels; may be empty), ``source``
* clips: ``frames`` (list of files), ``tracks`` (list of ``{"boxes": [...], "kind": "gt" | "pseudo"}``,
  one box per frame, null where unknown), ``source``
* cutouts: ``file`` of an image with an alpha channel
"""

from __future__ import annotations

import json
import tarfile
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, TypeVar

import numpy as np

from asymtrack_edge.errors import DatasetError
from asymtrack_edge.training.pool import CLIP, SMALLEST_BOX, STILL, Pool, PoolBuilder, decode_image

INDEXES = ("stills.json", "clips.json", "cutouts.json")
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".webp", ".bmp", ".tif", ".tiff")
VIDEO_SUFFIXES = (".mp4", ".avi", ".mov", ".mkv", ".webm", ".m4v", ".mpg", ".mpeg")

#: Elliptic cut-outs made where the data brings none.
MADE_CUTOUTS = 256

Item = TypeVar("Item")
#: Wraps an iterable to show progress; called with it and a title.
Progress = Callable[[Iterable[Any], str], Iterable[Any]]


def _silent(items: Iterable[Any], title: str) -> Iterable[Any]:
    return items


def is_collection(folder: Path) -> bool:
    """Whether ``folder`` has an index of the collection format."""
    return any((folder / name).is_file() for name in INDEXES)


def files_under(folder: Path, suffixes: Sequence[str]) -> List[Path]:
    """All files below ``folder`` with one of ``suffixes``, in order of their names."""
    return sorted(p for p in folder.rglob("*") if p.suffix.lower() in suffixes and p.is_file())


class _Shards:
    """Reads members of the tar files beside a collection's indexes, each tar read once."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.files: Dict[str, Dict[str, bytes]] = {}

    def read(self, shard: Any, name: str) -> bytes:
        """Bytes of ``name`` in ``shard``, a file name or a list of those to look through."""
        for one in shard if isinstance(shard, list) else [shard]:
            members = self._load(str(one))
            if name in members:
                return members[name]
        raise DatasetError(f"{shard} in {self.folder} holds no {name}")

    def _load(self, shard: str) -> Dict[str, bytes]:
        if shard not in self.files:
            # Only the name counts: an index cannot reach outside its own folder.
            path = self.folder / Path(shard).name
            try:
                with tarfile.open(path) as archive:
                    files = ((m.name, archive.extractfile(m)) for m in archive if m.isfile())
                    self.files[shard] = {name: file.read() for name, file in files if file is not None}
            except (OSError, tarfile.TarError) as error:
                raise DatasetError(f"cannot read the shard {path}: {error}") from None
        return self.files[shard]


def _records(folder: Path, name: str, limit: Optional[int]) -> List[Dict[str, Any]]:
    path = folder / name
    if not path.exists():
        return []
    try:
        records = json.loads(path.read_text(encoding="utf-8"))
    except ValueError as error:
        raise DatasetError(f"{path} is not valid JSON: {error}") from None
    if not isinstance(records, list):
        raise DatasetError(f"{path} is not a list of records")
    return records[:limit]


def load_collection(folder: Path, side: int = 320, limit: Optional[int] = None, progress: Progress = _silent) -> Pool:
    """Loads a collection (see the module's docstring) into memory.

    Args:
        folder: where the JSON files and tars are.
        side: canvas side in pixels; larger images are shrunk to it.
        limit: at most this many records of each file, for a rehearsal.
        progress: wraps the records to show how far loading is.

    Raises:
        DatasetError: a file is missing, unreadable, or there is nothing to train on.
    """
    stills, clips, cutouts = (_records(folder, name, limit) for name in INDEXES)
    shards = _Shards(folder)
    try:
        builder = PoolBuilder(side, len(stills) + sum(len(r["frames"]) for r in clips))
        for record in progress(stills, "stills"):
            _add_still(builder, record, shards)
        for record in progress(clips, "clips"):
            _add_clip(builder, record, shards)
        for record in cutouts:
            image = decode_image(shards.read(record["shard"], record["file"]), record["file"])
            if image.shape[2] != 4:
                raise DatasetError(f"{record['file']} has no alpha channel")
            builder.add_cutout(image)
    except KeyError as error:
        raise DatasetError(f"a record of the collection in {folder} has no {error}") from None
    if not builder.sizes:
        raise DatasetError(f"{folder} holds no stills.json or clips.json with images: nothing to train on")
    if not builder.cutouts:
        builder.add_elliptic_cutouts(MADE_CUTOUTS)
    return builder.build()


def _add_image(builder: PoolBuilder, shards: _Shards, shard: Any, name: str, same_clip: bool = False) -> Any:
    return builder.add_image(np.ascontiguousarray(decode_image(shards.read(shard, name), name)[..., :3]), same_clip)


def _add_still(builder: PoolBuilder, record: Dict[str, Any], shards: _Shards) -> None:
    index, scale = _add_image(builder, shards, record["shard"], record["file"])
    for box in record["boxes"]:
        if min(box[2:]) >= 10 and min(box[2:]) * scale >= SMALLEST_BOX:
            builder.add_target(STILL, record.get("source", ""), [index], [[v * scale for v in box]])


def _add_clip(builder: PoolBuilder, record: Dict[str, Any], shards: _Shards) -> None:
    frames = [_add_image(builder, shards, record["shard"], name, i > 0) for i, name in enumerate(record["frames"])]
    for track in record["tracks"]:
        known = [
            (frames[i][0], [v * frames[i][1] for v in box])
            for i, box in enumerate(track["boxes"])
            if box is not None and min(box[2:]) * frames[i][1] >= SMALLEST_BOX
        ]
        if known:
            # What follows a colon tells files of one origin apart; they share its weight.
            source = record.get("source", "").split(":")[0]
            builder.add_target(CLIP, source, [k[0] for k in known], [k[1] for k in known])


def load_images(folder: Path, side: int = 320, limit: Optional[int] = None, progress: Progress = _silent) -> Pool:
    """Loads any folder of images; targets are arbitrary regions and cut-outs.

    Images with transparent parts become cut-outs; where there are none, ellipses are cut from the
    others.

    Args:
        folder: searched with all folders below it.
        side: canvas side in pixels; larger images are shrunk to it.
        limit: at most this many images, spread evenly over the folder.
        progress: wraps the files to show how far loading is.

    Raises:
        DatasetError: there is no image, or one cannot be read.
    """
    files = files_under(folder, IMAGE_SUFFIXES)
    if limit is not None and len(files) > limit:
        files = [files[i * len(files) // limit] for i in range(limit)]
    builder = PoolBuilder(side, len(files))
    for path in progress(files, "images"):
        try:
            image = decode_image(path.read_bytes(), str(path))
        except OSError as error:
            raise DatasetError(f"cannot read the training image {path}: {error.strerror}") from None
        if image.shape[2] == 4 and (image[..., 3] < 128).mean() > 0.02:
            builder.add_cutout(image)
        else:
            builder.add_image(np.ascontiguousarray(image[..., :3]))
    if not builder.sizes:
        raise DatasetError(f"{folder} holds no images ({', '.join(IMAGE_SUFFIXES)})")
    if not builder.cutouts:
        builder.add_elliptic_cutouts(MADE_CUTOUTS)
    return builder.build()
