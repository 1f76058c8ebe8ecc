"""Readers of the paper's four data sets in their published layouts.

Each reader lists its targets at once and reads a target's boxes only when it is first drawn, so
that starting takes seconds even with TrackingNet's 30,000 videos.

Layouts::

    LaSOT        ROOT/airplane/airplane-1/{groundtruth,full_occlusion,out_of_view}.txt, img/00000001.jpg
                 (or all sequences directly under ROOT); ROOT/training_set.txt, where present, says
                 which belong to the training split
    GOT-10k      ROOT/train/GOT-10k_Train_000001/{groundtruth.txt, absence.label, cover.label,
                 00000001.jpg} (or ROOT itself is that train folder)
    TrackingNet  ROOT/TRAIN_*/anno/VIDEO.txt, ROOT/TRAIN_*/frames/VIDEO/0.jpg
    COCO2017     ROOT/annotations/instances_train2017.json, ROOT/train2017/000000000009.jpg
"""

from __future__ import annotations

import json
from functools import lru_cache
from pathlib import Path
from typing import Dict, List, NamedTuple, Optional, Protocol

import numpy as np

from asymtrack_edge.datasets.lasot import LASOT_TEST
from asymtrack_edge.errors import DatasetError

#: Smallest side of a box that is learnt from, in frame pixels.
SMALLEST_BOX = 4.0
#: Annotations that stay in memory, per data set.
KEPT_ANNOTATIONS = 50_000


class Annotation(NamedTuple):
    """Boxes of one target.

    Attributes:
        boxes: float32 ``(F, 4)`` x, y, w, h in pixels, one per frame.
        usable: int64 indices of the frames that show the target.
    """

    boxes: np.ndarray
    usable: np.ndarray


class Dataset(Protocol):
    """Targets in files of images."""

    name: str

    def __len__(self) -> int:
        """How many targets there are."""

    def annotation(self, target: int) -> Annotation:
        """Boxes of a target.

        Raises:
            DatasetError: its annotation is missing or malformed.
        """

    def frame(self, target: int, frame: int) -> Path:
        """The image file of a target's frame."""


def read_numbers(path: Path, columns: Optional[int] = None) -> np.ndarray:
    """Reads a text file of numbers separated by commas, blanks or lines.

    Args:
        path: the file.
        columns: numbers per line; None returns them flat.

    Raises:
        DatasetError: the file is missing or holds something else.
    """
    try:
        text = path.read_text()
        numbers = np.array(text.replace(",", " ").split(), np.float32)
        return numbers if columns is None else numbers.reshape(-1, columns)
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror}") from None
    except ValueError:
        shape = "numbers" if columns is None else f"lines of {columns} numbers"
        raise DatasetError(f"{path} does not consist of {shape}: download the annotation again") from None


def _annotation(boxes: np.ndarray, shown: Optional[np.ndarray] = None) -> Annotation:
    usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= SMALLEST_BOX).all(1)
    if shown is not None:
        usable &= shown[: len(usable)]
    return Annotation(boxes, np.nonzero(usable)[0])


def _folder(root: Path, name: str) -> Path:
    if not root.is_dir():
        raise DatasetError(f"there is no folder {root} with {name}: check the path")
    return root


class Lasot:
    """LaSOT (Fan et al. 2019), training split: ``training_set.txt``, or what is not of the test split."""

    name = "LaSOT"

    def __init__(self, root: Path) -> None:
        _folder(root, self.name)
        found = [*root.glob("*/groundtruth.txt"), *root.glob("*/*/groundtruth.txt")]
        folders = sorted(path.parent for path in found)
        split = root / "training_set.txt"
        if split.is_file():
            wanted = set(split.read_text().split())
            folders = [folder for folder in folders if folder.name in wanted]
        else:
            folders = [folder for folder in folders if folder.name not in LASOT_TEST]
        if not folders:
            raise DatasetError(f"{root} holds no training sequences of LaSOT (airplane/airplane-2/groundtruth.txt)")
        self.folders = folders
        self.annotation = lru_cache(KEPT_ANNOTATIONS)(self._read)

    def __len__(self) -> int:
        return len(self.folders)

    def _read(self, target: int) -> Annotation:
        folder = self.folders[target]
        boxes = read_numbers(folder / "groundtruth.txt", 4)
        shown = np.ones(len(boxes), bool)
        for name in ("full_occlusion.txt", "out_of_view.txt"):
            if (folder / name).is_file():
                hidden = read_numbers(folder / name) > 0
                if len(hidden) != len(boxes):
                    raise DatasetError(f"{folder / name} has {len(hidden)} numbers for {len(boxes)} frames")
                shown &= ~hidden
        return _annotation(boxes, shown)

    def frame(self, target: int, frame: int) -> Path:
        """The image file of a target's frame."""
        return self.folders[target] / "img" / f"{frame + 1:08d}.jpg"


class Got10k:
    """GOT-10k (Huang, Zhao and Huang 2019), training split."""

    name = "GOT-10k"

    def __init__(self, root: Path) -> None:
        _folder(root, self.name)
        train = root / "train" if (root / "train").is_dir() else root
        self.folders = sorted(p.parent for p in train.glob("*/groundtruth.txt"))
        if not self.folders:
            raise DatasetError(f"{root} holds no GOT-10k sequences (train/GOT-10k_Train_000001/groundtruth.txt)")
        self.annotation = lru_cache(KEPT_ANNOTATIONS)(self._read)

    def __len__(self) -> int:
        return len(self.folders)

    def _read(self, target: int) -> Annotation:
        folder = self.folders[target]
        boxes = read_numbers(folder / "groundtruth.txt", 4)
        shown = np.ones(len(boxes), bool)
        for name, smallest in (("absence.label", 0), ("cover.label", 1)):
            if (folder / name).is_file():
                label = read_numbers(folder / name)
                if len(label) != len(boxes):
                    raise DatasetError(f"{folder / name} has {len(label)} numbers for {len(boxes)} frames")
                # absence: 1 is absent; cover: 0 is invisible, 8 is fully visible.
                shown &= label == 0 if name == "absence.label" else label >= smallest
        return _annotation(boxes, shown)

    def frame(self, target: int, frame: int) -> Path:
        """The image file of a target's frame."""
        return self.folders[target] / f"{frame + 1:08d}.jpg"


class TrackingNet:
    """TrackingNet (Mueller et al. 2018), all training chunks that are present."""

    name = "TrackingNet"

    def __init__(self, root: Path) -> None:
        _folder(root, self.name)
        self.files = sorted(root.glob("TRAIN_*/anno/*.txt"))
        if not self.files:
            raise DatasetError(f"{root} holds no TrackingNet annotations (TRAIN_0/anno/VIDEO.txt)")
        self.annotation = lru_cache(KEPT_ANNOTATIONS)(self._read)

    def __len__(self) -> int:
        return len(self.files)

    def _read(self, target: int) -> Annotation:
        return _annotation(read_numbers(self.files[target], 4))

    def frame(self, target: int, frame: int) -> Path:
        """The image file of a target's frame."""
        file = self.files[target]
        return file.parent.parent / "frames" / file.stem / f"{frame}.jpg"


class Coco:
    """COCO2017 (Lin et al. 2014), training images: each box that is no crowd is a target."""

    name = "COCO2017"

    def __init__(self, root: Path) -> None:
        path = _folder(root, self.name) / "annotations" / "instances_train2017.json"
        try:
            index = json.loads(path.read_text(encoding="utf-8"))
            files: Dict[int, str] = {image["id"]: image["file_name"] for image in index["images"]}
            objects = [
                (files[o["image_id"]], o["bbox"])
                for o in index["annotations"]
                if not o.get("iscrowd") and min(o["bbox"][2:]) >= 10
            ]
        except OSError as error:
            raise DatasetError(f"cannot read {path}: {error.strerror}") from None
        except (ValueError, KeyError, TypeError) as error:
            raise DatasetError(f"{path} is not COCO's annotation: {error}") from None
        if not objects:
            raise DatasetError(f"{path} holds no boxes")
        self.images = root / "train2017"
        self.files: List[str] = [file for file, _ in objects]
        self.boxes = np.array([box for _, box in objects], np.float32)

    def __len__(self) -> int:
        return len(self.files)

    def annotation(self, target: int) -> Annotation:
        """Boxes of a target: one."""
        return Annotation(self.boxes[target : target + 1], np.zeros(1, np.int64))

    def frame(self, target: int, frame: int) -> Path:
        """The image file of a target's frame."""
        return self.images / self.files[target]
