"""Result files, in the layouts that the official toolkits and servers read.

GOT-10k's are ``<sequence>/<sequence>_001.txt`` and ``<sequence>/<sequence>_time.txt``, all others'
``<sequence>.txt`` and ``times/<sequence>_time.txt``.
A box file has one ``x,y,w,h`` row per frame, the first being the start box; a time file one number of
seconds per frame, the first being the initialisation.
"""

from __future__ import annotations

import json
import zipfile
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.datasets import Sequence
from asymtrack_edge.datasets.sequences import read_boxes, read_labels
from asymtrack_edge.errors import DatasetError, UsageError
from asymtrack_edge.files import OutputFile, printable, write_text

#: File beside the results that says what made them.
IDENTITY_FILE = "tracker.json"
#: What pytracking puts before the names of some data sets' sequences.
PREFIXES = ("", "uav_", "nfs_")


#: Boxes (N, 4), seconds (N,) or none, and what was done to make them fit, empty where nothing was.
Result = Tuple[np.ndarray, np.ndarray, str]


@dataclass(frozen=True)
class ResultStore:
    """Result files that this package writes, of one tracker on one data set: their folder, its protocol."""

    root: Path
    protocol: str

    def box_file(self, name: str) -> Path:
        """Where the boxes of sequence ``name`` are."""
        return self.root / name / f"{name}_001.txt" if self.protocol == "got10k" else self.root / f"{name}.txt"

    def time_file(self, name: str) -> Path:
        """Where the times of sequence ``name`` are."""
        return self.root / (name if self.protocol == "got10k" else "times") / f"{name}_time.txt"

    def write(self, name: str, boxes: np.ndarray, times: np.ndarray) -> None:
        """Writes boxes ``(N, 4)`` and seconds ``(N,)``; the box file appears last, so that it means complete."""
        # Precision of the GOT-10k toolkit's own files.
        _write(self.time_file(name), "".join(f"{t:.8f}\n" for t in times))
        _write(self.box_file(name), "".join(",".join(f"{v:.3f}" for v in box) + "\n" for box in boxes))

    def log(self, name: str, text: str) -> Path:
        """Writes what a failed sequence has to tell; returns the file."""
        return _write(self.root / "errors" / f"{name}.txt", text)

    def read(self, sequence: Sequence) -> Result:
        """Reads what ``write`` wrote; raises DatasetError where there is no whole result."""
        return _read(sequence, self.box_file(sequence.name), self.time_file(sequence.name))

    def complete(self, sequence: Sequence) -> bool:
        """Whether the sequence has a result for every frame, and no more."""
        with suppress(DatasetError):
            return not self.read(sequence)[2]
        return False

    def claim(self, identity: Dict[str, Any], fresh: bool = False) -> None:
        """Makes the folder this tracker's; ``fresh`` takes it over, else UsageError where it is another's."""
        path = self.root / IDENTITY_FILE
        if not fresh and path.exists():
            try:
                found = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"cannot read {path} ({error}): redo its results with --fresh") from None
            names = sorted(n for n in {*found, *identity} if found.get(n) != identity.get(n))
            changes = "; ".join(f"{n} was {found.get(n)}, is {identity.get(n)}" for n in names)
            if changes:
                advice = "redo them with --fresh, or give another --output"
                raise UsageError(f"the results in {self.root} were made otherwise ({changes}): {advice}")
        _write(path, json.dumps(identity, indent=1, sort_keys=True) + "\n")

    def forget(self, sequences: Items[Sequence]) -> None:
        """Removes the results of ``sequences``."""
        for sequence in sequences:
            for path in (self.box_file(sequence.name), self.time_file(sequence.name)):
                with suppress(FileNotFoundError):
                    path.unlink()

    def submission(self, sequences: Items[Sequence]) -> Path:
        """Packs the results as the data set's server wants them; returns the zip file.

        GOT-10k: a folder per sequence with its box and time files. TrackingNet: the box files alone.
        """
        path = self.root.with_name(f"{self.root.name}.zip")
        with OutputFile(path) as file, zipfile.ZipFile(file.place, "w", zipfile.ZIP_DEFLATED) as archive:
            for sequence in sequences:
                for found in (self.box_file(sequence.name), self.time_file(sequence.name)):
                    if self.protocol == "got10k" or found.parent == self.root:
                        archive.write(found, str(found.relative_to(self.root)))
        return path


class ForeignResults:
    """Result files of any toolkit, found under the names that toolkits give them.

    A sequence's file is ``<name>.txt`` or ``<name>/<name>_001.txt``, in upper or lower case, its name with
    pytracking's prefixes, or one of ``Sequence.aliases``. The files lie in the folder itself, or in that
    of its subfolders (pytracking's ``<tracker>_000``) which has the most. UsageError where there is none.
    """

    def __init__(self, root: Path, sequences: Items[Sequence]) -> None:
        if not root.is_dir():
            raise UsageError(f"there is no folder of results {printable(root)}")
        found = []
        for base in [root, *sorted(p for p in root.iterdir() if p.is_dir())]:
            files = [*base.glob("*.txt"), *base.glob("*/*.txt")]
            index = {path.relative_to(base).with_suffix("").as_posix().lower(): path for path in files}
            keys = {s.name: [key for key in _keys(s) if key in index] for s in sequences}
            found.append({name: index[matching[0]] for name, matching in keys.items() if matching})
        self.root = root
        self.files = max(found, key=len)
        if not self.files:
            first = f"{sequences[0].name}.txt"
            raise UsageError(f"{printable(root)} holds no result of any sequence: looked for {first} and so on")

    def read(self, sequence: Sequence) -> Result:
        """Reads one result; raises DatasetError where it is missing, unreadable or shorter than the sequence."""
        path = self.files.get(sequence.name)
        if path is None:
            raise DatasetError(f"{printable(self.root)} holds no result of it")
        name = f"{path.stem[:-4] if path.stem.endswith('_001') else path.stem}_time.txt"
        beside = path.with_name(name)
        return _read(sequence, path, beside if beside.is_file() else path.parent / "times" / name)


def _keys(sequence: Sequence) -> Iterator[str]:
    """The names, in lower case, under which toolkits keep the result of a sequence."""
    for name in (sequence.name, *sequence.aliases):
        for prefix in PREFIXES:
            key = f"{prefix}{name}".lower()
            yield from (key, f"{key}/{key}_001")


def _read(sequence: Sequence, path: Path, times: Path) -> Result:
    boxes, note, seconds = read_boxes(path), "", np.zeros(0)
    if len(boxes) < len(sequence):
        raise DatasetError(f"{printable(path)}: {len(boxes)} boxes for {len(sequence)} frames")
    if len(boxes) == len(sequence) + sequence.omitted:
        boxes = boxes[sequence.omitted :]
    elif len(boxes) > len(sequence):
        note = f"{len(boxes)} boxes in the results for {len(sequence)} frames: cut to the annotation"
        boxes = boxes[: len(sequence)]
    with suppress(DatasetError):
        seconds = read_labels(times)
    return boxes, seconds if len(seconds) == len(sequence) else np.zeros(0), note


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def speed(times: Items[np.ndarray]) -> Dict[str, Any]:
    """Frames per second of whole steps, initialisation included, decoding of image files not.

    ``mean_of_rates`` is the mean of 1/t, the figure of the GOT-10k toolkit, never below what a camera would see.
    """
    seconds = np.concatenate([np.zeros(0), *times])
    seconds = seconds[seconds > 0]
    total, mean = (len(seconds) / seconds.sum(), (1 / seconds).mean()) if len(seconds) else (np.nan, np.nan)
    rates = {"frames_over_total_time": float(total), "mean_of_rates": float(mean)}
    return {"protocol": "P7", "frames": len(seconds), **rates}
