"""Result files, in the layouts that the official toolkits and servers read.

* ``plain`` (OTB and those after it): ``<sequence>.txt`` and ``times/<sequence>_time.txt``
* ``got10k``: ``<sequence>/<sequence>_001.txt`` and ``<sequence>/<sequence>_time.txt``
* ``trackingnet``: as ``plain``

A box file has one ``x,y,w,h`` row per frame, the first being the start box; a time file one number of
seconds per frame, the first being the initialisation.
"""

from __future__ import annotations

import json
import os
import zipfile
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, List, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.datasets.sequences import Sequence, read_boxes, read_labels
from asymtrack_edge.errors import DatasetError, UsageError

#: File beside the results that says what made them.
IDENTITY_FILE = "tracker.json"


@dataclass(frozen=True)
class ResultStore:
    """Result files of one tracker on one data set.

    Attributes:
        root: their folder.
        layout: ``"plain"``, ``"got10k"`` or ``"trackingnet"``.
    """

    root: Path
    layout: str = "plain"

    def box_file(self, name: str) -> Path:
        """Where the boxes of sequence ``name`` are."""
        if self.layout == "got10k":
            return self.root / name / f"{name}_001.txt"
        return self.root / f"{name}.txt"

    def time_file(self, name: str) -> Path:
        """Where the times of sequence ``name`` are."""
        if self.layout == "got10k":
            return self.root / name / f"{name}_time.txt"
        return self.root / "times" / f"{name}_time.txt"

    def write(self, sequence: Sequence, boxes: np.ndarray, times: np.ndarray) -> None:
        """Writes one result; the box file appears last and whole, so that its presence means complete.

        Args:
            sequence: which one.
            boxes: float ``(N, 4)``, x, y, w, h.
            times: float ``(N,)``, seconds.
        """
        # Precision of the GOT-10k toolkit's own files.
        _write(self.time_file(sequence.name), [f"{t:.8f}" for t in times])
        _write(self.box_file(sequence.name), [",".join(f"{v:.3f}" for v in box) for box in boxes])

    def boxes(self, sequence: Sequence) -> np.ndarray:
        """Reads the boxes of one sequence, float64 ``(N, 4)``.

        Raises:
            DatasetError: the file is missing, unreadable or has another number of rows.
        """
        path = self.box_file(sequence.name)
        boxes = read_boxes(path)
        if len(boxes) != len(sequence):
            raise DatasetError(f"{path}: {len(boxes)} boxes for {len(sequence)} frames")
        return boxes

    def times(self, sequence: Sequence) -> np.ndarray:
        """Reads the seconds per frame, float64 ``(N,)``; empty where they are not there or not whole."""
        try:
            times = read_labels(self.time_file(sequence.name))
        except DatasetError:
            return np.zeros(0)
        return times if len(times) == len(sequence) else np.zeros(0)

    def complete(self, sequence: Sequence) -> bool:
        """Whether the sequence has a result for every frame."""
        try:
            return self.boxes(sequence).shape == (len(sequence), 4)
        except DatasetError:
            return False

    def claim(self, identity: Dict[str, Any], fresh: bool = False) -> None:
        """Makes the folder this tracker's, or checks that it already is.

        Args:
            identity: what made the results, JSON-serialisable.
            fresh: take the folder over, whoever's it was.

        Raises:
            UsageError: the results in the folder are another tracker's, or cannot be attributed.
        """
        path = self.root / IDENTITY_FILE
        if not fresh and path.exists():
            try:
                found = json.loads(path.read_text())
            except (OSError, ValueError) as error:
                raise UsageError(f"cannot read {path} ({error}): redo its results with --fresh") from None
            if found != identity:
                names = set(found) | set(identity) if isinstance(found, dict) else {"identity"}
                found = found if isinstance(found, dict) else {"identity": found}
                differing = sorted(n for n in names if found.get(n) != identity.get(n))
                changes = "; ".join(f"{n} was {found.get(n)}, is {identity.get(n)}" for n in differing)
                raise UsageError(
                    f"the results in {self.root} were made otherwise ({changes}): redo them with --fresh, or "
                    "give another --output"
                )
        _write(path, json.dumps(identity, indent=1, sort_keys=True).splitlines())

    def forget(self, sequences: Items[Sequence]) -> None:
        """Removes the results of ``sequences``."""
        for sequence in sequences:
            for path in (self.box_file(sequence.name), self.time_file(sequence.name)):
                if path.exists():
                    path.unlink()

    def submission(self, sequences: Items[Sequence]) -> Path:
        """Packs the results as the data set's server wants them; returns the zip file.

        GOT-10k: a folder per sequence with its box and time files. TrackingNet: the box files alone.
        """
        target = self.root.with_name(f"{self.root.name}.zip")
        partial = target.with_name(f"{target.name}.part")
        with zipfile.ZipFile(partial, "w", zipfile.ZIP_DEFLATED) as archive:
            for sequence in sequences:
                files = [self.box_file(sequence.name)]
                if self.layout == "got10k":
                    files.append(self.time_file(sequence.name))
                for path in files:
                    archive.write(path, str(path.relative_to(self.root)))
        os.replace(partial, target)
        return target


@dataclass(frozen=True)
class Speed:
    """Frames per second of whole steps, decoding of image files not included, initialisation included.

    Attributes:
        frames: how many were timed.
        total: frames over their total time: what a camera would see.
        mean_of_rates: mean of 1/t, the figure of the GOT-10k toolkit, never below ``total``.
    """

    frames: int
    total: float
    mean_of_rates: float


def speed(times: Items[np.ndarray]) -> Speed:
    """Speed over all sequences; frames whose time is not positive are not counted."""
    joined = np.concatenate([np.zeros(0), *times])
    joined = joined[joined > 0]
    if not len(joined):
        return Speed(0, float("nan"), float("nan"))
    return Speed(len(joined), float(len(joined) / joined.sum()), float((1 / joined).mean()))


def _write(path: Path, lines: List[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    partial = path.with_name(f"{path.name}.part")
    partial.write_text("\n".join(lines) + "\n")
    os.replace(partial, path)


def split_complete(store: ResultStore, sequences: Items[Sequence]) -> Tuple[List[Sequence], List[Sequence]]:
    """Sequences that have a whole result, and those that must be run."""
    done = [s for s in sequences if store.complete(s)]
    names = {s.name for s in done}
    return done, [s for s in sequences if s.name not in names]
