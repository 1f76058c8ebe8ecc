"""What every data set comes down to: named sequences of frames with a ground-truth box for each."""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import List, Optional, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import DatasetError

#: File name endings taken for frames, in lower case.
IMAGE_SUFFIXES = (".jpg", ".jpeg", ".png", ".bmp")


@dataclass(frozen=True)
class Sequence:
    """One target in one video.

    Attributes:
        name: unique in its data set; result files are named after it.
        frames: image files in order, N of them.
        truth: float64 ``(N, 4)``, x, y, w, h in pixels (top-left, 0-based as published); nan where a
            frame is not annotated. Row 0 is the box a tracker starts from.
        attributes: names of the challenges the data set's authors gave the sequence.
        absent: bool ``(N,)``, true where the target is declared out of view or fully hidden; None
            where the data set does not say.
        size: width and height of the frames in pixels; None to have it measured when it is needed.
    """

    name: str
    frames: Tuple[Path, ...]
    truth: np.ndarray
    attributes: Tuple[str, ...] = ()
    absent: Optional[np.ndarray] = None
    size: Optional[Tuple[int, int]] = None

    def __post_init__(self) -> None:
        if self.truth.shape != (len(self.frames), 4):
            raise DatasetError(
                f"sequence {self.name}: {len(self.frames)} frames but {len(self.truth)} boxes of ground truth"
            )
        if self.absent is not None and self.absent.shape != (len(self.frames),):
            raise DatasetError(
                f"sequence {self.name}: {len(self.frames)} frames but {len(self.absent)} visibility labels"
            )
        if not self.frames or not np.isfinite(self.truth[0]).all() or self.truth[0, 2:].min() <= 0:
            raise DatasetError(f"sequence {self.name}: its first frame has no ground-truth box to start from")

    def __len__(self) -> int:
        return len(self.frames)

    @property
    def start(self) -> Tuple[float, float, float, float]:
        """The box a tracker is initialised with."""
        x, y, w, h = (float(value) for value in self.truth[0])
        return x, y, w, h

    def read(self, index: int) -> np.ndarray:
        """Decodes one frame to BGR uint8 ``(H, W, 3)``.

        Raises:
            DatasetError: the file is missing or no image.
        """
        frame = cv2.imread(str(self.frames[index]), cv2.IMREAD_COLOR)
        if frame is None:
            raise DatasetError(f"sequence {self.name}: cannot read the frame {self.frames[index]}")
        return frame

    def frame_size(self) -> Tuple[int, int]:
        """Width and height of the frames: ``size``, or measured on the first frame."""
        if self.size is not None:
            return self.size
        height, width = self.read(0).shape[:2]
        return width, height


def list_frames(folder: Path) -> List[Path]:
    """Image files of ``folder`` ordered by the last number in their names, then by name.

    Numeric order is what TrackingNet needs (``2.jpg`` before ``10.jpg``) and agrees with the order of
    names where numbers are padded.
    """
    if not folder.is_dir():
        return []

    def key(path: Path) -> Tuple[int, str]:
        numbers = re.findall(r"\d+", path.stem)
        return (int(numbers[-1]) if numbers else -1, path.name)

    # Files such as ._0001.jpg are left behind by archives made on macOS.
    found = (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES and not p.name.startswith("."))
    return sorted(found, key=key)


def read_table(path: Path) -> np.ndarray:
    """Reads numbers separated by commas, blanks or tabs; ``nan`` is allowed.

    Returns:
        float64 ``(rows, columns)``; ``(0, 0)`` for an empty file.

    Raises:
        DatasetError: the file cannot be read, or is no table of numbers.
    """
    try:
        lines = path.read_text(encoding="utf-8-sig").splitlines()
        rows = [[float(v) for v in line.replace(",", " ").split()] for line in lines if line.strip()]
        return np.array(rows, np.float64) if rows else np.zeros((0, 0))
    except OSError as error:
        raise DatasetError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError as error:
        raise DatasetError(f"{path} is not a table of numbers with equally long rows: {error}") from None


def read_boxes(path: Path) -> np.ndarray:
    """Reads one ``x, y, w, h`` row per frame; float64 ``(N, 4)``.

    Raises:
        DatasetError: as ``read_table``, or a row has other than four values.
    """
    table = read_table(path)
    if table.shape[1] != 4:
        raise DatasetError(f"{path}: expected rows of x,y,w,h, found {table.shape[1]} values a row")
    return table


def read_labels(path: Path) -> np.ndarray:
    """Reads one number per frame, however the file breaks its lines; float64 ``(N,)``."""
    return read_table(path).reshape(-1)
