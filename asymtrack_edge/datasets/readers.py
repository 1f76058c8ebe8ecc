"""Readers of the data sets in the folder layouts their authors publish.

A reader takes the root folder and returns, by name and in the published order, a loader for each sequence. Opening
therefore takes seconds even with TrackingNet's 30,000 videos, and a bad sequence fails only when it is read.
"""

from __future__ import annotations

import json
import os
from dataclasses import dataclass, replace
from functools import lru_cache, partial
from itertools import groupby
from pathlib import Path
from typing import Any, Callable, Dict, Iterable, List, NamedTuple, Optional, Tuple

import numpy as np

from asymtrack_edge.datasets.sequences import SMALLEST_BOX, Frames, Sequence, frames_of, read_boxes, read_labels
from asymtrack_edge.errors import DatasetError, UsageError
from asymtrack_edge.files import list_files, printable, read_lines

#: What the data sets' folders do not state: splits, first frames (from 1), the columns of attribute files.
SPLITS: Dict[str, Any] = json.loads(Path(__file__).with_name("splits.json").read_text(encoding="utf-8"))
#: Annotations that stay in memory for training, per data set.
KEPT_ANNOTATIONS = 50_000

Loaders = Dict[str, Callable[[str], Sequence]]
Reader = Callable[[Path], Loaders]


def _found(loaders: Loaders, root: Path, looked_for: str) -> Loaders:
    if not root.is_dir():
        raise DatasetError(f"there is no folder {printable(root)}: give the folder of the data set")
    if not loaders:
        raise DatasetError(f"{printable(root)} is not laid out as published: looked for {looked_for}")
    return loaders


def _within(root: Path, name: str) -> Path:
    """The subfolder ``name`` of ``root`` if it exists, else ``root``, which may be that folder itself."""
    return root / name if name and (root / name).is_dir() else root


def _find(root: Path, *patterns: str) -> List[Path]:
    """Matching files, sorted by folder and name, without hidden ones: some systems add ``._1.txt`` to ``1.txt``."""
    found = (path for pattern in patterns for path in root.glob(pattern))
    visible = (path for path in found if not any(part.startswith(".") for part in path.relative_to(root).parts))
    return sorted(visible, key=lambda path: (path.parent.name, path.name))


def _published(name: str, frames: Frames, truth: np.ndarray, **more: Any) -> Sequence:
    """A sequence; it is withheld if only its start box is published."""
    withheld = len(truth) == 1 < len(frames)
    if withheld:
        truth = np.vstack([truth, np.full((len(frames) - 1, 4), np.nan)])
    return Sequence(name, frames, truth, withheld=withheld, **more)


def _read_otb(root: Path) -> Loaders:
    """OTB-2013/2015: ``<seq>/img/0001.jpg ...`` and ``<seq>/groundtruth_rect.txt``.

    Sequences with two targets have ``groundtruth_rect.1.txt`` and ``.2.txt`` and become ``<seq>.1`` and
    ``<seq>.2`` (Jogging, Skating2); an empty file is skipped (Human4's first). Images that the annotation
    does not cover and the first five frames of Tiger1 are left out as in the toolkit.
    """
    loaders: Loaders = {}
    for folder, found in groupby(
        _find(root, "*/groundtruth_rect.txt", "*/groundtruth_rect.[0-9].txt"), lambda path: path.parent.name
    ):
        files = list(found)
        if len(files) > 1:
            files = [path for path in files if path.read_bytes().strip()]
        for number, path in enumerate(files, start=1):
            loaders[folder if len(files) == 1 else f"{folder}.{number}"] = partial(_otb, path)
    return _found(loaders, root, "<sequence>/groundtruth_rect.txt beside <sequence>/img/*.jpg")


def _otb(path: Path, name: str) -> Sequence:
    folder, truth, frames = path.parent, read_boxes(path), Frames(path.parent / "img")
    first, last = SPLITS["otb"]["first_and_last_image"].get(folder.name, (1, len(frames)))
    if len(frames) > len(truth):
        frames = frames.cut(first - 1, last)
    omitted = SPLITS["otb"]["frames_omitted"].get(folder.name, 0)
    number = path.stem.rpartition(".")[2]
    aliases = tuple(f"{folder.name}{mark}{number}" for mark in ".-_") if number.isdigit() else ()
    return Sequence(name, frames.cut(omitted, len(frames)), truth[omitted:], aliases=aliases, omitted=omitted)


def _read_lasot(split: str, root: Path) -> Loaders:
    """LaSOT: ``airplane/airplane-1/{img/00000001.jpg ..., groundtruth.txt, full_occlusion.txt, out_of_view.txt}``.

    ``airplane-1`` may also lie directly in the root, as in the archive of the test split. The split ``test``
    or ``train`` is what ``testing_set.txt`` or ``training_set.txt`` in the root lists, else the published one.
    ``all`` takes every folder: LaSOText, LaSOT's extension.
    """
    listed = root / f"{split}ing_set.txt"
    wanted = set(read_lines(listed) if listed.is_file() else SPLITS["lasot"]["test"])
    outsiders = split == "train" and not listed.is_file()
    folders = [path.parent for path in _find(root, "*/groundtruth.txt", "*/*/groundtruth.txt")]
    folders = [f for f in folders if split == "all" or (f.name in wanted) is not outsiders]
    loaders: Loaders = {folder.name: partial(_lasot, folder) for folder in folders}
    return _found(loaders, root, f"sequences ({split}) as <category>/<category>-<number>/groundtruth.txt")


def _lasot(folder: Path, name: str) -> Sequence:
    truth, frames, note = read_boxes(folder / "groundtruth.txt"), Frames(folder / "img"), ""
    longer = len(frames) > len(truth)
    if longer:
        # As the toolkit does: airplane-15 is published with one image too many.
        if name != "airplane-15":
            note = f"{len(frames)} frames but {len(truth)} boxes of ground truth: cut to the annotation"
        frames = frames.cut(0, len(truth))
    absent = np.zeros(len(truth), bool)
    for label in ("full_occlusion.txt", "out_of_view.txt"):
        values = read_labels(folder / label)
        if len(values) < len(truth) or (len(values) > len(truth) and not longer):
            raise DatasetError(f"{label} has {len(values)} labels for {len(truth)} frames")
        absent |= values[: len(truth)] > 0
    return Sequence(name, frames, truth, absent=absent, note=note)


def _read_got10k(subset: str, root: Path, start_only: bool = False, visible_only: bool = False) -> Loaders:
    """GOT-10k: the folders in ``list.txt``, in its order, if it exists; else all with a ``groundtruth.txt``.

    The root may also be the subset's folder itself. With the subset ``""``, it is any folder of sequences.
    """
    base = _within(root, subset)
    if (base / "list.txt").is_file():
        folders = [base / name for name in read_lines(base / "list.txt")]
        if visible_only:  # for training, a part of the archive is enough
            folders = [folder for folder in folders if folder.is_dir()]
    else:
        annotated = {path.parent for path in _find(base, "*/groundtruth.txt")}
        others = [path for path in base.glob("[!.]*") if path.is_dir() and path not in annotated]
        # Unreadable folders, and folders with frames but no boxes, are reported when they are read.
        unread = (path for path in others if not os.access(path, os.X_OK) or len(frames_of(path)))
        folders = sorted([*annotated, *unread]) if annotated else []
    load = partial(_got10k, start_only=start_only, visible_only=visible_only)
    loaders: Loaders = {folder.name: partial(load, folder) for folder in folders}
    if len(loaders) < len(set(folders)):
        raise DatasetError(f"{printable(base / 'list.txt')} names several folders with the same name: rename them")
    return _found(loaders, root, f"{subset or '.'}/list.txt or {subset or '.'}/<sequence>/groundtruth.txt")


def _got10k(folder: Path, name: str, start_only: bool, visible_only: bool) -> Sequence:
    """GOT-10k: ``val/list.txt``, ``val/GOT-10k_Val_000001/{00000001.jpg ..., groundtruth.txt, *.label}``.

    ``start_only``: the boxes after the first are withheld.
    The toolkit's scores use only ``cover.label``, which grades the visible part of the target from 0 to 8;
    ``visible_only`` also leaves out the frames marked in ``absence.label``.
    """
    truth = read_boxes(folder / "groundtruth.txt")[: 1 if start_only else None]
    labels = {path.stem: read_labels(path) for path in list_files(folder, (".label",))}
    attributes: List[str] = [label for label in ("absence", "cut_by_image") if np.any(labels.get(label, 0))]
    if "cover" in labels and (labels["cover"] < 8).any():
        attributes.append("occlusion")
    marks = [labels["cover"] == 0] if "cover" in labels else []
    if "absence" in labels and (visible_only or not marks):
        marks.append(labels["absence"] > 0)
    if len({len(mark) for mark in marks}) > 1:
        raise DatasetError(f"its labels differ in number: {', '.join(f'{len(v)} {k}' for k, v in labels.items())}")
    absent = np.any(marks, axis=0) if marks else None
    return _published(name, frames_of(folder), truth, attributes=tuple(attributes), absent=absent)


def _files(load: Callable[..., Sequence], *patterns: str) -> Reader:
    """Reads a sequence from each annotation file that matches a pattern; the file's stem is its name."""

    def read(root: Path) -> Loaders:
        loaders: Loaders = {path.stem: partial(load, path) for path in _find(root, *patterns)}
        return _found(loaders, root, " or ".join(patterns))

    return read


def _trackingnet(path: Path, name: str) -> Sequence:
    """TrackingNet: ``TEST/anno/<seq>.txt`` and ``TEST/frames/<seq>/{0.jpg, 1.jpg, ...}``; ``TRAIN_0`` and so on.

    The root may also be a single chunk.
    """
    return _published(name, Frames(path.parent.parent / "frames" / name), read_boxes(path))


def _nfs(path: Path, name: str) -> Sequence:
    """NfS at 30 fps: ``<seq>/30/<seq>.txt`` and ``<seq>/30/<seq>/00001.jpg ...``, or ``<seq>/<seq>/30`` as archived.

    A row of the annotation is ``track xmin ymin xmax ymax frame lost occluded generated "label"``. Where the file
    still annotates the 240 fps video, every eighth row is taken; one frame or row too many at the end is cut off.
    """
    try:
        rows = [[float(value) for value in line.split()[1:5]] for line in read_lines(path)]
        corners = np.array(rows, np.float64).reshape(len(rows), 4)
    except ValueError:
        raise DatasetError(f"{printable(path)}: rows are not 'track xmin ymin xmax ymax ...'") from None
    truth = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
    frames = Frames(path.parent / name)
    if len(frames) and abs(len(truth) / len(frames) - 8) < 1:
        truth = truth[::8]
    if abs(len(frames) - len(truth)) == 1:
        frames, truth = frames.cut(0, len(truth)), truth[: len(frames)]
    return Sequence(name, frames, truth)


def _uav123(path: Path, name: str) -> Sequence:
    """UAV123: ``anno/UAV123/<seq>.txt`` and ``data_seq/UAV123/<folder>/000001.jpg ...``.

    Rows are ``nan`` where the target is out of view. Several sequences may be parts of one folder
    (``bird1_1`` to ``bird1_3`` of ``bird1``): the toolkit states the frame at which each part starts.
    """
    parts, truth = SPLITS["uav123"]["first_image"], read_boxes(path)
    folder = name.rpartition("_")[0] if name in parts else name
    first = parts.get(name, 1) - 1
    images = path.parents[2] / "data_seq" / "UAV123" / folder
    frames = Frames(images)
    if 0 < len(frames) <= first:
        raise DatasetError(f"{printable(images)} has {len(frames)} images, but this part begins at {first + 1}")
    part = frames.cut(first, first + len(truth))
    last = first + len(part)
    if name in parts and len(part) and frames[last - 1].stem.lstrip("0") != str(last):
        raise DatasetError(f"{printable(images)} lacks images: number {last} is {frames[last - 1].name}")
    return Sequence(name, part, truth)


def _read_coco(root: Path) -> Loaders:
    """COCO2017, training images: each box with sides of ten pixels or more that is not a crowd is a one-frame target.

    Boxes are named by their position in the annotation and kept as an array, as there are 800,000.
    """
    looked_for = "annotations/instances_train2017.json"
    pictures = root / ("train2017" if (root / "train2017").is_dir() else "images/train2017")
    if not ((root / looked_for).is_file() and pictures.is_dir()):
        return _found({}, root, f"{looked_for} and train2017/*.jpg or images/train2017/*.jpg")
    try:
        index = json.loads((root / looked_for).read_text(encoding="utf-8"))
        there = {path.name for path in list_files(pictures)}  # a part of the archive is enough
        images = {image["id"]: image["file_name"] for image in index["images"] if image["file_name"] in there}
        objects = [o for o in index["annotations"] if not o.get("iscrowd") and len(o.get("bbox") or ()) == 4]
        objects = [o for o in objects if min(o["bbox"][2:]) >= 10 and o["image_id"] in images]
        files = [images[o["image_id"]] for o in objects]
        boxes = np.array([o["bbox"] for o in objects], np.float64).reshape(-1, 4)
    except (AttributeError, KeyError, OverflowError, RecursionError, TypeError, ValueError) as error:
        raise DatasetError(f"{root / looked_for} is not a COCO annotation file: {error}") from None

    def load(name: str) -> Sequence:
        return Sequence(name, Frames(pictures, [files[int(name)]]), boxes[[int(name)]])

    return _found(dict.fromkeys(map(str, range(len(files))), load), root, f"{looked_for} and its images in train2017")


@dataclass(frozen=True)
class Kind:
    """How a data set is read, scored and written."""

    title: str  # as written in papers
    read: Reader
    protocol: str  # key of ``benchmarks.accuracy.metrics.PROTOCOLS``; empty for training images
    attributes: Tuple[str, ...] = ()  # the meaning of the 0/1 columns in its authors' attribute files
    size: Optional[int] = None  # number of sequences in the published set


_OTB, _LASOT, _UAV = (tuple(SPLITS[name]["attributes"]) for name in ("otb", "lasot", "uav123"))
DATASETS: Dict[str, Kind] = {
    "folder": Kind("GOT-10k-style folder", partial(_read_got10k, ""), "folder"),
    "otb": Kind("OTB", _read_otb, "otb", attributes=_OTB),
    "lasot": Kind("LaSOT", partial(_read_lasot, "test"), "lasot", attributes=_LASOT, size=280),
    "lasot-train": Kind("LaSOT train", partial(_read_lasot, "train"), "lasot", attributes=_LASOT, size=1120),
    "lasotext": Kind("LaSOText", partial(_read_lasot, "all"), "lasotext", attributes=_LASOT, size=150),
    "got10k-val": Kind("GOT-10k val", partial(_read_got10k, "val"), "got10k", size=180),
    "got10k-test": Kind("GOT-10k test", partial(_read_got10k, "test", start_only=True), "got10k", size=180),
    "got10k-train": Kind("GOT-10k train", partial(_read_got10k, "train", visible_only=True), "got10k", size=9335),
    "trackingnet": Kind("TrackingNet", _files(_trackingnet, "TEST/anno/*.txt", "anno/*.txt"), "trackingnet", size=511),
    "trackingnet-train": Kind(
        "TrackingNet train", _files(_trackingnet, "TRAIN_*/anno/*.txt", "anno/*.txt"), "trackingnet"
    ),
    "nfs30": Kind("NfS (30 fps)", _files(_nfs, "*/30/*.txt", "*/*/30/*.txt"), "nfs", size=100),
    "uav123": Kind("UAV123", _files(_uav123, "anno/UAV123/*.txt"), "uav123", attributes=_UAV, size=123),
    "coco-train": Kind("COCO2017 train", _read_coco, ""),
}


class Annotation(NamedTuple):
    """A target in the form that training uses."""

    boxes: np.ndarray  # float32 (N, 4) x, y, w, h in pixels, one per frame
    usable: np.ndarray  # int64 indices of the frames where the target is visible and large enough to learn from
    frames: Frames


class Dataset:
    """A data set on disk; its sequences are read on demand.

    Args:
        name: key of ``DATASETS``, which becomes ``kind``.
        root: the data set's folder; raises ``DatasetError`` if it is not laid out as published.
        attributes: folder of ``<sequence>.txt`` files with 0/1 columns, as in the toolkits of OTB, LaSOT
            and UAV123; by default, the data set's own place under ``root``, if it exists.
    """

    def __init__(self, name: str, root: Path, attributes: Optional[Path] = None) -> None:
        if name not in DATASETS:
            raise UsageError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
        self.kind = DATASETS[name]
        if attributes is not None and not self.kind.attributes:
            raise UsageError(f"{self.kind.title} has no attribute files: leave out --attributes")
        self.root = root
        self._loaders = self.kind.read(root)
        # Toolkits differ in upper and lower case.
        found = (attributes or _within(root, "anno/UAV123") / "att").glob("*.txt")
        self._attributes = {path.stem.lower(): path for path in found}
        if attributes is not None and not self._attributes:
            raise UsageError(f"there are no attribute files (*.txt) in {printable(attributes)}")
        self.names = list(self._loaders)
        self.left_out: List[str] = []  #: why sequences were left out of training
        self.annotation = lru_cache(KEPT_ANNOTATIONS)(self._annotation)

    def __len__(self) -> int:
        return len(self.names)

    def sequence(self, name: str) -> Sequence:
        """Reads one sequence; raises a ``DatasetError`` that names it if it is missing or damaged."""
        try:
            sequence = self._loaders[name](name)
            columns, names = self.kind.attributes, (name, *sequence.aliases)
            path = next((self._attributes[n.lower()] for n in names if n.lower() in self._attributes), None)
            if not columns or path is None:
                return sequence
            flags = read_labels(path)
            if len(flags) != len(columns):
                raise DatasetError(f"{printable(path)}: {len(flags)} attributes, but {len(columns)} are expected")
            return replace(sequence, attributes=tuple(n for n, flag in zip(columns, flags) if flag > 0))
        except (DatasetError, OSError) as error:
            raise DatasetError(f"sequence {printable(name)}: {error}") from None

    def read(self, wanted: Optional[Iterable[str]] = None) -> Tuple[List[Sequence], Dict[str, str]]:
        """Reads the named sequences, or all; a bad one does not affect the others.

        Returns:
            The readable sequences, in the published order, and the reasons for the others, by name.

        Raises:
            UsageError: a name is unknown.
            DatasetError: no sequence can be read.
        """
        chosen = set(self.names if wanted is None else wanted)
        if missing := sorted(printable(name) for name in chosen - set(self.names)):
            raise UsageError(f"no sequence called {', '.join(missing)} in {printable(self.root)}")
        read, left_out = [], {}
        for name in self.names:
            if name in chosen:
                try:
                    read.append(self.sequence(name))
                except DatasetError as error:
                    left_out[name] = str(error)
        if not read:
            more = f" (and {len(left_out) - 1} more)" if len(left_out) > 1 else ""
            raise DatasetError(f"no sequence can be read: {next(iter(left_out.values()))}{more}")
        return read, left_out

    def _annotation(self, index: int) -> Annotation:
        """The target of a sequence, by its position in ``names``; ``annotation`` caches it.

        A sequence that cannot be read is added to ``left_out`` and has no usable frames: training goes on without it.
        """
        try:
            sequence = self.sequence(self.names[index])
        except DatasetError as error:
            self.left_out.append(f"{self.kind.title}: {error}")
            return Annotation(np.zeros((0, 4), np.float32), np.zeros(0, np.int64), Frames("", ()))
        boxes = sequence.truth.astype(np.float32)
        usable = np.isfinite(boxes).all(1) & (boxes[:, 2:] >= SMALLEST_BOX).all(1) & sequence.visible
        return Annotation(boxes, np.nonzero(usable)[0], sequence.frames)
