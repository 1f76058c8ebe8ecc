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
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any, Dict, Iterator, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.datasets import Sequence
from asymtrack_edge.datasets.sequences import read_boxes, read_labels, read_rows
from asymtrack_edge.errors import DatasetError, UsageError
from asymtrack_edge.files import OutputFile, printable, write_text

#: File beside the results that says what made them.
IDENTITY_FILE = "tracker.json"


@dataclass
class Results:
    """Result files of one tracker on one data set: by sequence those of its boxes and of its times."""

    root: Path
    files: Dict[str, Tuple[Path, Path]]
    identity: Dict[str, Any] = field(default_factory=dict)  # of what makes them

    @classmethod
    def own(cls, root: Path, protocol: str, sequences: Items[Sequence], identity: Dict[str, Any]) -> Results:
        """Those that this package writes."""
        boxes, times = ("{0}.txt", "times/{0}_time.txt")
        if protocol == "got10k":
            boxes, times = ("{0}/{0}_001.txt", "{0}/{0}_time.txt")
        files = {s.name: (root / boxes.format(s.name), root / times.format(s.name)) for s in sequences}
        return cls(root, files, identity)

    @classmethod
    def found(cls, root: Path, sequences: Items[Sequence]) -> Results:
        """Those of any toolkit, under the names that toolkits give them; UsageError for none, or several runs.

        A sequence's file is ``<name>.txt`` or ``<name>/<name>_001.txt``, its name with pytracking's prefixes, or one
        of ``Sequence.aliases``; or, where none is written so, any of them in upper or lower case. The files lie in the
        folder itself, or in that of its subfolders (pytracking's ``<tracker>_000``) which has the most.
        """
        if not root.is_dir():
            raise UsageError(f"there is no folder of results {printable(root)}")
        candidates = []
        for base in [root, *sorted(p for p in root.iterdir() if p.is_dir())]:
            files = [*base.glob("*.txt"), *base.glob("*/*.txt")]
            exact = {path.relative_to(base).with_suffix("").as_posix(): path for path in files}
            lower = {key.lower(): path for key, path in exact.items()}
            # In this order: pytracking puts OTB's Car2 beside uav_car2.
            paths = {s.name: [*map(exact.get, _keys(s)), *map(lower.get, map(str.lower, _keys(s)))] for s in sequences}
            found = {name: next(filter(None, options)) for name, options in paths.items() if any(options)}
            candidates.append((len(found), base, found))
        best, _, most = max(candidates, key=lambda candidate: candidate[0])
        equal = [printable(base) for count, base, _ in candidates if count == best]
        if not most:
            first = f"{sequences[0].name}.txt"
            raise UsageError(f"{printable(root)} holds no result of any sequence: looked for {first} and so on")
        if len(equal) > 1 and equal[0] != printable(root):
            raise UsageError(f"{printable(root)} holds results of several runs: name one, such as {equal[0]}")
        return cls(root, {name: (path, _times_of(path)) for name, path in most.items()})

    def read(self, sequence: Sequence) -> Tuple[np.ndarray, np.ndarray, str]:
        """Boxes (N, 4), seconds (N,) or none, and what was done to make them fit, empty where nothing was.

        Raises DatasetError where the result is missing, unreadable or shorter than the sequence.
        """
        if sequence.name not in self.files:
            raise DatasetError(f"{printable(self.root)} holds no result of it")
        path, times = self.files[sequence.name]
        boxes, note, seconds = read_boxes(path), "", np.zeros(0)
        if len(boxes) < len(sequence):
            raise DatasetError(f"{printable(path)}: {len(boxes)} boxes for {len(sequence)} frames")
        if path.stem == f"{path.parent.name}_001" and path.with_name(f"{path.parent.name}_002.txt").exists():
            note = "several repetitions in the results: the first is scored"
        if len(boxes) == len(sequence) + sequence.omitted:
            boxes = boxes[sequence.omitted :]
        elif len(boxes) > len(sequence):
            note = f"{len(boxes)} boxes in the results for {len(sequence)} frames: cut to the annotation"
            boxes = boxes[: len(sequence)]
        with suppress(DatasetError):
            rows = read_rows(times)  # GOT-10k's toolkit writes a column for each repetition
            seconds = np.array([row[0] for row in rows]) if len(rows) == len(sequence) else read_labels(times)
        return boxes, seconds if len(seconds) == len(sequence) else np.zeros(0), note

    def complete(self, sequence: Sequence) -> bool:
        """Whether the sequence has a result for every frame, and no more, from its start box on."""
        with suppress(DatasetError):
            boxes, _, note = self.read(sequence)
            whole = not note and self.files[sequence.name][1].is_file()
            return whole and np.allclose(boxes[0], sequence.start, atol=1e-3)
        return False

    def write(self, name: str, boxes: np.ndarray, times: np.ndarray) -> None:
        """Writes boxes ``(N, 4)`` and seconds ``(N,)``; the box file appears last, so that it means complete."""
        # Precision of the GOT-10k toolkit's own files.
        _write(self.files[name][1], "".join(f"{t:.8f}\n" for t in times))
        _write(self.files[name][0], "".join(",".join(f"{v:.3f}" for v in box) + "\n" for box in boxes))
        (self.root / "errors" / f"{name}.log").unlink(missing_ok=True)

    def log(self, name: str, text: str) -> Path:
        """Writes what a failed sequence has to tell; returns the file."""
        return _write(self.root / "errors" / f"{name}.log", text)

    def claim(self, fresh: bool) -> None:
        """Makes the folder this tracker's; ``fresh`` removes the results of these sequences."""
        for files in self.files.values() if fresh else ():
            for file in files:
                file.unlink(missing_ok=True)
        _write(self.root / IDENTITY_FILE, json.dumps(self.identity, indent=1, sort_keys=True) + "\n")

    def check(self) -> None:
        """UsageError where the folder is another tracker's."""
        path, identity = self.root / IDENTITY_FILE, self.identity
        if path.exists() or any(boxes.exists() for boxes, _ in self.files.values()):
            try:
                found = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, ValueError, TypeError) as error:
                raise UsageError(f"cannot read {path} ({error}): redo all results with --fresh") from None
            names = sorted(n for n in {*found, *identity} if found.get(n) != identity.get(n))
            changes = "; ".join(f"{n} was {found.get(n)}, is {identity.get(n)}" for n in names)
            if changes:
                advice = "redo them all with --fresh, or give another --output"
                raise UsageError(f"the results in {self.root} were made otherwise ({changes}): {advice}")

    @property
    def archive(self) -> Path:
        """What ``submission`` writes."""
        return self.root.with_name(f"{self.root.name}.zip")

    def submission(self) -> Path:
        """Packs the results as the data set's server wants them; returns the zip file.

        GOT-10k: a folder per sequence with its box and time files. TrackingNet: the box files alone.
        """
        with OutputFile(self.archive) as file, zipfile.ZipFile(file.place, "w", zipfile.ZIP_DEFLATED) as archive:
            for boxes, times in self.files.values():
                for found in (boxes,) if boxes.parent == self.root else (boxes, times):
                    archive.write(found, str(found.relative_to(self.root)))
        return self.archive


def _keys(sequence: Sequence) -> Iterator[str]:
    """The names under which toolkits keep the result of a sequence."""
    for name in (sequence.name, *sequence.aliases):
        for prefix in ("", "uav_", "nfs_"):  # pytracking's, of some data sets
            key = f"{prefix}{name}"
            yield from (key, f"{key}/{key}_001")


def _times_of(path: Path) -> Path:
    """Where the times beside a file of boxes are."""
    name = f"{path.parent.name if path.stem == f'{path.parent.name}_001' else path.stem}_time.txt"
    return path.with_name(name) if path.with_name(name).is_file() else path.parent / "times" / name


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
