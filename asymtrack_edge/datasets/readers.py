"""Readers of the data sets in the folder layouts their authors publish.

Each reader takes the data set's root folder and returns its sequences in a fixed order; each raises
DatasetError, saying what was looked for, where the folder is not laid out so.
"""

from __future__ import annotations

import ast
import configparser
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Callable, Dict, List, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.datasets import splits
from asymtrack_edge.datasets.lasot import LASOT_TEST
from asymtrack_edge.datasets.sequences import (
    Sequence,
    list_frames,
    read_boxes,
    read_labels,
    read_table,
)
from asymtrack_edge.errors import DatasetError, UsageError


@dataclass(frozen=True)
class Dataset:
    """How a data set is read, scored and written.

    Attributes:
        title: its name as the field writes it.
        read: from a root folder to the sequences.
        protocol: key of ``definitions.PROTOCOLS``.
        layout: result files: ``"plain"``, ``"got10k"`` or ``"trackingnet"`` (see ``results.py``).
        attributes: what the 0/1 columns of its authors' attribute files mean.
        attribute_folder: where those files lie under the root, where they are part of the data set.
        size: how many sequences the published test set has; None where there is no such number.
    """

    title: str
    read: Callable[[Path], List[Sequence]]
    protocol: str
    layout: str = "plain"
    attributes: Tuple[str, ...] = ()
    attribute_folder: str = "att"
    size: Optional[int] = None


def _require(found: object, root: Path, looked_for: str) -> None:
    if not found:
        reason = "" if root.is_dir() else " (there is no such folder)"
        raise DatasetError(f"{root} is not laid out as published{reason}: looked for {looked_for}")


def _subfolders(root: Path) -> List[Path]:
    return sorted(p for p in root.iterdir() if p.is_dir()) if root.is_dir() else []


def _trimmed(name: str, frames: List[Path], truth: np.ndarray, slack: int) -> Tuple[List[Path], np.ndarray]:
    """Cuts the longer of the two where published images and annotation differ by ``slack`` frames or less."""
    if abs(len(frames) - len(truth)) > slack:
        raise DatasetError(f"sequence {name}: {len(frames)} frames but {len(truth)} boxes of ground truth")
    count = min(len(frames), len(truth))
    return frames[:count], truth[:count]


def _with_unknown(truth: np.ndarray, frames: List[Path]) -> np.ndarray:
    """Adds a row of nan for each further frame where only the start box is published."""
    return np.vstack([truth, np.full((len(frames) - 1, 4), np.nan)]) if len(truth) == 1 < len(frames) else truth


def read_otb(root: Path) -> List[Sequence]:
    """OTB-2013/2015: ``<seq>/img/0001.jpg ...`` and ``<seq>/groundtruth_rect.txt``.

    Sequences with two targets have ``groundtruth_rect.1.txt`` and ``.2.txt`` and become ``<seq>.1`` and
    ``<seq>.2`` (Jogging, Skating2); an empty file is skipped (Human4's first). Images that the
    annotation does not cover (David, Football1, Freeman3, Freeman4, Diving) and the first five frames
    of Tiger1 are left out as in the toolkit. Which of the benchmark's lists is evaluated is decided by
    the folders that are there.
    """
    sequences = []
    for folder in _subfolders(root):
        tables = [(path, read_table(path)) for path in sorted(folder.glob("groundtruth_rect*.txt"))]
        tables = [(path, truth) for path, truth in tables if truth.size]
        for number, (_, truth) in enumerate(tables, start=1):
            name = folder.name if len(tables) == 1 else f"{folder.name}.{number}"
            frames = list_frames(folder / "img")
            first, last = splits.OTB_RANGES.get(folder.name, (1, len(frames)))
            if len(frames) > len(truth):
                frames = frames[first - 1 : last]
            omitted = splits.OTB_OMITTED.get(folder.name, 0)
            sequences.append(Sequence(name, tuple(frames[omitted:]), truth[omitted:]))
    _require(sequences, root, "<sequence>/groundtruth_rect.txt beside <sequence>/img/*.jpg")
    return sequences


def _lasot_sequence(folder: Path) -> Sequence:
    truth = read_boxes(folder / "groundtruth.txt")
    frames, truth = _trimmed(folder.name, list_frames(folder / "img"), truth, slack=0)
    absent = np.zeros(len(frames), bool)
    for label in ("full_occlusion.txt", "out_of_view.txt"):
        values = read_labels(folder / label)
        if len(values) != len(frames):
            raise DatasetError(f"{folder / label}: {len(values)} labels for {len(frames)} frames")
        absent |= values > 0
    return Sequence(folder.name, tuple(frames), truth, absent=absent)


def _lasot_folders(root: Path) -> List[Path]:
    files = list(root.glob("*/groundtruth.txt")) + list(root.glob("*/*/groundtruth.txt"))
    _require(files, root, "<category>/<category>-<number>/groundtruth.txt or <category>-<number>/groundtruth.txt")
    return sorted((f.parent for f in files), key=lambda p: p.name)


def read_lasot(root: Path) -> List[Sequence]:
    """LaSOT, test split: ``airplane/airplane-1/{img/00000001.jpg ..., groundtruth.txt, ...}``.

    Beside the boxes (one row per frame) each sequence has ``full_occlusion.txt`` and
    ``out_of_view.txt`` (0/1 per frame, on one line). ``airplane-1`` may also lie directly in the root,
    as in the archive of the test split alone. Of the folders there, those of the test split are read:
    the list is ``testing_set.txt`` in the root where that exists, else the published one.
    """
    listed = root / "testing_set.txt"
    wanted = set(listed.read_text().split()) if listed.is_file() else set(LASOT_TEST)
    folders = [folder for folder in _lasot_folders(root) if folder.name in wanted]
    _require(folders, root, "sequences of the test split, such as airplane/airplane-1")
    return [_lasot_sequence(folder) for folder in folders]


def read_lasot_extension(root: Path) -> List[Sequence]:
    """LaSOText, the 150 sequences of LaSOT's extension, laid out as LaSOT; all folders are read."""
    return [_lasot_sequence(folder) for folder in _lasot_folders(root)]


def _got10k_size(folder: Path) -> Optional[Tuple[int, int]]:
    """The resolution in ``meta_info.ini``, as (width, height); None where it is not stated."""
    path = folder / "meta_info.ini"
    parser = configparser.ConfigParser(interpolation=None)
    try:
        parser.read(path, encoding="utf-8")
        width, height = ast.literal_eval(parser.get("METAINFO", "resolution"))
        return int(width), int(height)
    except (configparser.NoSectionError, configparser.NoOptionError, ValueError, SyntaxError, TypeError):
        return None
    except configparser.Error as error:
        raise DatasetError(f"{path} cannot be read: {error}") from None


def _got10k_sequence(folder: Path, start_only: bool = False) -> Sequence:
    """One folder of GOT-10k: images, ``groundtruth.txt``, ``*.label`` and ``meta_info.ini`` where there."""
    frames = list_frames(folder)
    truth = read_boxes(folder / "groundtruth.txt")
    truth = _with_unknown(truth[:1] if start_only else truth, frames)
    labels: Dict[str, np.ndarray] = {}
    for name in ("cover", "absence", "cut_by_image"):
        if (folder / f"{name}.label").is_file():
            labels[name] = read_labels(folder / f"{name}.label")
    attributes: List[str] = [name for name in ("absence", "cut_by_image") if name in labels and labels[name].any()]
    absent = None
    if "cover" in labels:
        # "cover" grades how much of the target is seen, 0 (nothing) to 8 (everything).
        absent = labels["cover"] == 0
        if (labels["cover"] < 8).any():
            attributes.append("occlusion")
    elif "absence" in labels:
        absent = labels["absence"] > 0
    return Sequence(folder.name, tuple(frames), truth, tuple(attributes), absent, _got10k_size(folder))


def _read_got10k(root: Path, subset: str, start_only: bool) -> List[Sequence]:
    folder = root / subset if (root / subset).is_dir() else root
    listing = folder / "list.txt"
    _require(listing.is_file(), root, f"{subset}/list.txt and {subset}/<sequence>/groundtruth.txt")
    return [_got10k_sequence(folder / name, start_only) for name in listing.read_text().split()]


def read_got10k_val(root: Path) -> List[Sequence]:
    """GOT-10k validation: ``val/list.txt``, ``val/GOT-10k_Val_000001/{00000001.jpg ..., groundtruth.txt}``.

    Each sequence also has ``cover.label``, ``absence.label``, ``cut_by_image.label`` (a number per
    frame) and ``meta_info.ini``. The root may also be the ``val`` folder itself.
    """
    return _read_got10k(root, "val", start_only=False)


def read_got10k_test(root: Path) -> List[Sequence]:
    """GOT-10k test: as validation under ``test``, ``groundtruth.txt`` holding only the start box."""
    return _read_got10k(root, "test", start_only=True)


def read_trackingnet(root: Path) -> List[Sequence]:
    """TrackingNet test: ``TEST/anno/<seq>.txt`` and ``TEST/frames/<seq>/{0.jpg, 1.jpg, ...}``.

    The published annotation of the test set is the start box alone; a file with a box for every frame
    (a split of the training set arranged so) can be scored here. The root may also be ``TEST`` itself.
    """
    base = root / "TEST" if (root / "TEST").is_dir() else root
    files = sorted((base / "anno").glob("*.txt"))
    _require(files, root, "TEST/anno/<sequence>.txt and TEST/frames/<sequence>/0.jpg")
    sequences = []
    for path in files:
        frames = list_frames(base / "frames" / path.stem)
        sequences.append(Sequence(path.stem, tuple(frames), _with_unknown(read_boxes(path), frames)))
    return sequences


def read_nfs30(root: Path) -> List[Sequence]:
    """NfS at 30 fps: ``<seq>/30/<seq>.txt`` and ``<seq>/30/<seq>/00001.jpg ...``.

    A row of the annotation is ``track xmin ymin xmax ymax frame lost occluded generated "label"``. Where
    the file still annotates the 240 fps video, every eighth row is taken; a difference of one frame at
    the end, which some sequences have, is cut off. The archives' extra folder (``<seq>/<seq>/30``) is
    accepted.
    """
    files = sorted([*root.glob("*/30/*.txt"), *root.glob("*/*/30/*.txt")], key=lambda p: p.name)
    _require(files, root, "<sequence>/30/<sequence>.txt and <sequence>/30/<sequence>/00001.jpg")
    sequences = []
    for path in files:
        try:
            rows = [line.split()[1:5] for line in path.read_text().splitlines() if line.strip()]
            corners = np.array(rows, np.float64).reshape(-1, 4)
        except ValueError:
            raise DatasetError(f"{path}: rows are not 'track xmin ymin xmax ymax ...'") from None
        truth = np.hstack([corners[:, :2], corners[:, 2:] - corners[:, :2]])
        frames = list_frames(path.parent / path.stem)
        if frames and abs(len(truth) / len(frames) - 8) < 1:
            truth = truth[::8]
        frames, truth = _trimmed(path.stem, frames, truth, slack=1)
        sequences.append(Sequence(path.stem, tuple(frames), truth))
    return sequences


def read_uav123(root: Path) -> List[Sequence]:
    """UAV123: ``anno/UAV123/<seq>.txt`` and ``data_seq/UAV123/<folder>/000001.jpg ...``.

    Rows are ``nan`` where the target is out of view. Several sequences may be parts of one folder
    (``bird1_1`` to ``bird1_3`` of ``bird1``): the frame each part starts with is the toolkit's.
    """
    files = sorted((root / "anno" / "UAV123").glob("*.txt"))
    _require(files, root, "anno/UAV123/<sequence>.txt and data_seq/UAV123/<sequence>/000001.jpg")
    sequences = []
    for path in files:
        folder, _, part = path.stem.rpartition("_")
        starts = splits.UAV123_PARTS.get(folder, ())
        if part.isdigit() and 1 <= int(part) <= len(starts):
            start = starts[int(part) - 1]
        else:
            folder, start = path.stem, 1
        truth = read_boxes(path)
        frames = list_frames(root / "data_seq" / "UAV123" / folder)
        sequences.append(Sequence(path.stem, tuple(frames[start - 1 : start - 1 + len(truth)]), truth))
    return sequences


def read_folder(root: Path) -> List[Sequence]:
    """Any folder in GOT-10k's layout: ``<seq>/{images, groundtruth.txt}``, labels optional.

    ``list.txt``, where there, says which sequences and in what order; otherwise every subfolder with a
    ``groundtruth.txt`` is one, by name. Frames without annotation have ``nan`` rows.
    """
    listing = root / "list.txt"
    if listing.is_file():
        folders = [root / name for name in listing.read_text().split()]
    else:
        folders = [folder for folder in _subfolders(root) if (folder / "groundtruth.txt").is_file()]
    _require(folders, root, "<sequence>/groundtruth.txt beside <sequence>/*.jpg (GOT-10k's layout)")
    return [_got10k_sequence(folder) for folder in folders]


DATASETS: Dict[str, Dataset] = {
    "folder": Dataset("GOT-10k-style folder", read_folder, "folder"),
    "otb": Dataset("OTB", read_otb, "otb", attributes=splits.OTB_ATTRIBUTES),
    "lasot": Dataset("LaSOT", read_lasot, "lasot", attributes=splits.LASOT_ATTRIBUTES, size=280),
    "lasotext": Dataset("LaSOText", read_lasot_extension, "lasot", attributes=splits.LASOT_ATTRIBUTES, size=150),
    "got10k-val": Dataset("GOT-10k val", read_got10k_val, "got10k", layout="got10k", size=180),
    "got10k-test": Dataset("GOT-10k test", read_got10k_test, "got10k", layout="got10k", size=180),
    "trackingnet": Dataset("TrackingNet", read_trackingnet, "trackingnet", layout="trackingnet", size=511),
    "nfs30": Dataset("NfS (30 fps)", read_nfs30, "nfs", size=100),
    "uav123": Dataset(
        "UAV123",
        read_uav123,
        "uav123",
        attributes=splits.UAV123_ATTRIBUTES,
        attribute_folder="anno/UAV123/att",
        size=123,
    ),
}


def read_dataset(
    name: str, root: Path, only: Optional[Items[str]] = None, attributes: Optional[Path] = None
) -> List[Sequence]:
    """Reads the sequences of a data set.

    Args:
        name: key of ``DATASETS``.
        root: the data set's folder.
        only: names of the sequences to keep; None for all.
        attributes: folder of ``<sequence>.txt`` files with 0/1 columns, as the toolkits of OTB, LaSOT
            and UAV123 have; default the data set's own place under ``root``, if it is there.

    Raises:
        DatasetError: the folder is not laid out as published.
        UsageError: an unknown data set or sequence, or attributes for a data set without them.
    """
    if name not in DATASETS:
        raise UsageError(f"unknown data set {name!r}: choose one of {', '.join(DATASETS)}")
    dataset = DATASETS[name]
    if attributes is not None and not dataset.attributes:
        raise UsageError(f"{dataset.title} has no attribute files: leave --attributes out")
    if attributes is not None and not attributes.is_dir():
        raise UsageError(f"there is no folder of attributes {attributes}")
    sequences = dataset.read(root)
    if only is not None:
        unknown = sorted(set(only) - {s.name for s in sequences})
        if unknown:
            raise UsageError(f"no sequence called {', '.join(unknown)} in {root}")
        sequences = [s for s in sequences if s.name in set(only)]
    if dataset.attributes:
        folder = attributes or root / dataset.attribute_folder
        sequences = [_with_attributes(s, folder / f"{s.name}.txt", dataset.attributes) for s in sequences]
    return sequences


def _with_attributes(sequence: Sequence, path: Path, names: Tuple[str, ...]) -> Sequence:
    if not path.is_file():
        return sequence
    flags = read_labels(path)
    if len(flags) != len(names):
        raise DatasetError(f"{path}: expected {len(names)} attributes ({', '.join(names)}), found {len(flags)}")
    return replace(sequence, attributes=tuple(n for n, flag in zip(names, flags) if flag > 0))
