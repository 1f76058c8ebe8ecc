"""Result files, in the layouts that the official toolkits and servers read.

For GOT-10k they are ``<sequence>/<sequence>_001.txt`` and ``<sequence>/<sequence>_time.txt``, for all other
data sets ``<sequence>.txt`` and ``times/<sequence>_time.txt``.
A box file has one ``x,y,w,h`` row per frame; the first is the start box. A time file has one number of
seconds per frame; the first is the initialisation.
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
    """Result files of one tracker on one data set; ``files`` maps a sequence to its box and time files."""

    root: Path
    files: Dict[str, Tuple[Path, Path]]
    identity: Dict[str, Any] = field(default_factory=dict)  # of the tracker that makes the results

    @classmethod
    def own(cls, root: Path, protocol: str, sequences: Items[Sequence], identity: Dict[str, Any]) -> Results:
        """The result files that this package writes."""
        boxes, times = ("{0}.txt", "times/{0}_time.txt")
        if protocol == "got10k":
            boxes, times = ("{0}/{0}_001.txt", "{0}/{0}_time.txt")
        files = {s.name: (root / boxes.format(s.name), root / times.format(s.name)) for s in sequences}
        return cls(root, files, identity)

    @classmethod
    def found(cls, root: Path, sequences: Items[Sequence]) -> Results:
        """The result files of any toolkit. Raises UsageError if there are none, or several runs of them.

        A sequence's file is ``<name>.txt`` or ``<name>/<name>_001.txt``. ``<name>`` is the sequence's name or one of
        its ``Sequence.aliases``, with or without pytracking's prefixes; case matters only if several files match. The
        files are in the folder itself or in one subfolder (pytracking's ``<tracker>_000``): the one with the most.
        """
        if not root.is_dir():
            raise UsageError(f"there is no folder of results {printable(root)}")
        candidates = []
        for base in [root, *sorted(p for p in root.iterdir() if p.is_dir())]:
            files = [*base.glob("*.txt"), *base.glob("*/*.txt")]
            exact = {path.relative_to(base).with_suffix("").as_posix(): path for path in files}
            lower = {key.lower(): path for key, path in exact.items()}
            # Exact case first: pytracking writes OTB's Car2 and UAV123's uav_car2 into one folder.
            paths = {s.name: [*map(exact.get, _keys(s)), *map(lower.get, map(str.lower, _keys(s)))] for s in sequences}
            found = {name: next(filter(None, options)) for name, options in paths.items() if any(options)}
            candidates.append((len(found), base, found))
        best, _, most = max(candidates, key=lambda candidate: candidate[0])
        equal = [printable(base) for count, base, _ in candidates if count == best]
        if not most:
            first = f"{sequences[0].name}.txt"
            raise UsageError(f"{printable(root)} has no results for these sequences: looked for {first} and so on")
        if len(equal) > 1 and equal[0] != printable(root):
            raise UsageError(f"{printable(root)} has results of several runs: name one, such as {equal[0]}")
        return cls(root, {name: (path, _times_of(path)) for name, path in most.items()})

    def read(self, sequence: Sequence) -> Tuple[np.ndarray, np.ndarray, str]:
        """Boxes (N, 4), seconds (N,) or (0,), and a note on what was done to make the result fit (or "").

        Raises DatasetError if the result is missing, unreadable or shorter than the sequence.
        """
        if sequence.name not in self.files:
            raise DatasetError(f"{printable(self.root)} has no result for it")
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
        """Whether the result has the sequence's start box, exactly one box per frame, and a time file."""
        with suppress(DatasetError):
            boxes, _, note = self.read(sequence)
            whole = not note and self.files[sequence.name][1].is_file()
            return whole and np.allclose(boxes[0], sequence.start, atol=1e-3)
        return False

    def write(self, name: str, boxes: np.ndarray, times: np.ndarray) -> None:
        """Writes boxes ``(N, 4)`` and seconds ``(N,)``; the box file comes last, so its presence means completeness."""
        # The same precision as in the GOT-10k toolkit's own files.
        _write(self.files[name][1], "".join(f"{t:.8f}\n" for t in times))
        _write(self.files[name][0], "".join(",".join(f"{v:.3f}" for v in box) + "\n" for box in boxes))
        (self.root / "errors" / f"{name}.log").unlink(missing_ok=True)

    def log(self, name: str, text: str) -> Path:
        """Writes the traceback of a failed sequence; returns the file."""
        return _write(self.root / "errors" / f"{name}.log", text)

    def claim(self, fresh: bool) -> None:
        """Marks the folder as this tracker's; ``fresh`` first removes the results of these sequences."""
        for files in self.files.values() if fresh else ():
            for file in files:
                file.unlink(missing_ok=True)
        _write(self.root / IDENTITY_FILE, json.dumps(self.identity, indent=1, sort_keys=True) + "\n")

    def check(self) -> None:
        """Raises UsageError if the folder has results of another tracker."""
        path, identity = self.root / IDENTITY_FILE, self.identity
        if path.exists() or any(boxes.exists() for boxes, _ in self.files.values()):
            try:
                found = dict(json.loads(path.read_text(encoding="utf-8")))
            except (OSError, RecursionError, TypeError, ValueError) as error:
                raise UsageError(f"cannot read {path} ({error}): redo all results with --fresh") from None
            names = sorted(n for n in {*found, *identity} if found.get(n) != identity.get(n))
            if changes := "; ".join(f"{n} was {found.get(n)}, is {identity.get(n)}" for n in names):
                advice = "redo them all with --fresh, or give another --output"
                raise UsageError(f"the results in {self.root} were made differently ({changes}): {advice}")

    @property
    def archive(self) -> Path:
        """The zip file that ``submission`` writes."""
        return self.root.with_name(f"{self.root.name}.zip")

    def submission(self) -> Path:
        """Packs the results as the data set's server expects them; returns the zip file.

        GOT-10k: a folder per sequence with its box and time files. TrackingNet: only the box files.
        """
        with OutputFile(self.archive) as file, zipfile.ZipFile(file.place, "w", zipfile.ZIP_DEFLATED) as archive:
            for boxes, times in self.files.values():
                for found in (boxes,) if boxes.parent == self.root else (boxes, times):
                    archive.write(found, str(found.relative_to(self.root)))
        return self.archive


def _keys(sequence: Sequence) -> Iterator[str]:
    """The names that toolkits give to the result of a sequence."""
    for name in (sequence.name, *sequence.aliases):
        for prefix in ("", "uav_", "nfs_"):  # pytracking's prefixes for some data sets
            key = f"{prefix}{name}"
            yield from (key, f"{key}/{key}_001")


def _times_of(path: Path) -> Path:
    """The time file that belongs to a box file."""
    name = f"{path.parent.name if path.stem == f'{path.parent.name}_001' else path.stem}_time.txt"
    return path.with_name(name) if path.with_name(name).is_file() else path.parent / "times" / name


def _write(path: Path, text: str) -> Path:
    path.parent.mkdir(parents=True, exist_ok=True)
    write_text(path, text)
    return path


def speed(times: Items[np.ndarray]) -> Dict[str, Any]:
    """Frames per second of ``init`` and ``update``, without the decoding of image files.

    ``mean_of_rates`` is the mean of 1/t, the GOT-10k toolkit's figure. It is never below ``frames_over_total_time``.
    """
    seconds = np.concatenate([np.zeros(0), *times])
    seconds = seconds[seconds > 0]
    total, mean = (len(seconds) / seconds.sum(), (1 / seconds).mean()) if len(seconds) else (np.nan, np.nan)
    rates = {"frames_over_total_time": float(total), "mean_of_rates": float(mean)}
    return {"protocol": "P7", "frames": len(seconds), **rates}
