"""The common form of all data sets: named sequences of frames with a ground-truth box for each frame."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Iterable, Iterator, List, Optional, Tuple

import numpy as np

from asymtrack_edge.errors import DatasetError
from asymtrack_edge.files import AnyPath, list_files, printable, read_image, read_lines

#: Smallest side of a box that is used for training: on disk in frame pixels, in memory in canvas pixels.
SMALLEST_BOX = 4.0


class Frames:
    """The image files of a sequence, in order. A frame takes a few bytes, so that thousands of sequences can be kept.

    Without ``names``, these are all visible images in the folder, ``2.jpg`` before ``10.jpg``.
    """

    def __init__(self, folder: AnyPath, names: Optional[Iterable[str]] = None) -> None:
        self.folder = str(folder)
        if names is None:
            try:
                names = [path.name for path in list_files(folder)]
            except OSError:
                names = []  # reported when a sequence is made of them
        encoded = np.array([name.encode("utf-8", "surrogateescape") for name in names])
        self.names = encoded if encoded.size else np.zeros(0, "S1")

    def __len__(self) -> int:
        return len(self.names)

    def __getitem__(self, index: int) -> Path:
        return Path(self.folder, bytes(self.names[index]).decode("utf-8", "surrogateescape"))

    def __iter__(self) -> Iterator[Path]:
        return (self[i] for i in range(len(self)))

    def cut(self, first: int, last: int) -> Frames:
        """The frames from ``first`` up to, but not including, ``last``."""
        part = Frames(self.folder, ())
        part.names = self.names[first:last]
        return part


def frames_of(folder: Path) -> Frames:
    """The images in ``folder``, beside the boxes, or else in a subfolder with a usual name."""
    beside = Frames(folder)
    inside = (folder / name for name in ("img", "imgs", "images", "frames", "color"))
    return beside if len(beside) else next((frames for frames in map(Frames, inside) if len(frames)), beside)


@dataclass(frozen=True)
class Sequence:
    """One target in one video; raises ``DatasetError`` if frames, boxes and labels differ in number or row 0 is no box.

    Attributes:
        name: unique in its data set; result files are named after it.
        frames: image files in order, N of them.
        truth: float64 ``(N, 4)``, x, y, w, h in pixels (top-left), as published: OTB and LaSOT count from 1;
            nan where a frame is not annotated. Row 0 is the box that a tracker starts from.
        attributes: names of the challenges that the data set's authors assigned to the sequence.
        absent: bool ``(N,)``, true where the target is declared out of view or fully hidden; None
            where the data set does not say.
        aliases: names of the sequence in other toolkits.
        omitted: number of frames at the start that the data set's toolkit leaves out, but others do not.
        withheld: only the start box is published.
        note: what differed from the published data and was corrected here; else empty.
    """

    name: str
    frames: Frames
    truth: np.ndarray
    attributes: Tuple[str, ...] = ()
    absent: Optional[np.ndarray] = None
    aliases: Tuple[str, ...] = ()
    omitted: int = 0
    withheld: bool = False
    note: str = ""

    def __post_init__(self) -> None:
        if not len(self.frames):
            raise DatasetError(f"there are no images in {printable(self.frames.folder)}")
        if self.truth.shape != (len(self.frames), 4):
            raise DatasetError(f"{len(self.frames)} frames but {len(self.truth)} boxes of ground truth")
        if self.absent is not None and self.absent.shape != (len(self.frames),):
            raise DatasetError(f"{len(self.frames)} frames but {len(self.absent)} visibility labels")
        if not np.isfinite(self.truth[0]).all() or self.truth[0, 2:].min() <= 0:
            raise DatasetError("its first frame has no ground-truth box to start from")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def start(self) -> Tuple[float, float, float, float]:
        """The box that a tracker is initialised with."""
        x, y, w, h = (float(value) for value in self.truth[0])
        return x, y, w, h

    @property
    def visible(self) -> np.ndarray:
        """Bool ``(N,)``: not declared absent; true for all frames where the data set does not say."""
        return np.ones(len(self), bool) if self.absent is None else ~self.absent

    def read(self, index: int) -> np.ndarray:
        """Decodes one frame as ``read_frame`` does; all 16-bit frames are stretched alike."""
        return read_frame(self.frames[index], self.frames[0])


def read_frame(path: Path, first: Optional[Path] = None) -> np.ndarray:
    """Decodes an image file as ``files.decode_image`` does; raises ``DatasetError`` if it is missing or no image."""
    frame = read_image(path, first)
    if frame is None:
        state = "is not an image OpenCV can decode" if path.is_file() else "does not exist"
        raise DatasetError(f"the frame {printable(path)} {state}: download it again, or remove its sequence")
    return frame


def read_rows(path: Path) -> List[List[float]]:
    """Reads numbers separated by commas, semicolons, spaces or tabs; ``nan`` is allowed, empty lines are skipped.

    Raises ``DatasetError`` if the file cannot be read or holds anything else.
    """
    try:
        return [[float(value) for value in re.split(r"[,;\s]+", line.strip(",; "))] for line in read_lines(path)]
    except ValueError as error:
        raise DatasetError(f"{printable(path)} is not a table of numbers: {error}") from None


def read_boxes(path: Path) -> np.ndarray:
    """Reads one ``x, y, w, h`` row per frame, float64 ``(N, 4)``; raises ``DatasetError`` for any other content."""
    rows = read_rows(path)
    for i, row in enumerate(rows, start=1):
        if len(row) != 4:
            raise DatasetError(f"{printable(path)}: expected rows of x,y,w,h, found {len(row)} values in row {i}")
    return np.array(rows, np.float64).reshape(-1, 4)


def read_labels(path: Path) -> np.ndarray:
    """Reads one number per frame, wherever the lines break; float64 ``(N,)``."""
    return np.array([value for row in read_rows(path) for value in row], np.float64)
