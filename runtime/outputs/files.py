"""What a tracking run leaves behind: boxes as csv, an annotated video, a strip of pictures.

Files are written beside their final name and renamed when complete. If the run is interrupted or
the disk becomes full they are completed with what there is, and renamed all the same.
"""

from __future__ import annotations

import errno
import os
import shutil
from abc import ABC, abstractmethod
from pathlib import Path
from time import monotonic
from typing import TYPE_CHECKING, List, Optional

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.runtime.outputs.drawing import draw_track
from asymtrack_edge.runtime.target import Track

if TYPE_CHECKING:
    from asymtrack_edge.runtime.outputs.messages import Result
    from asymtrack_edge.runtime.sources.capture import Captured

CSV_HEADER = "frame,x,y,w,h,score,state"

#: Encoders do not tell that the disk is full, and need room for their index at the end.
LEAST_FREE = 32 << 20


class Sink(ABC):
    """Takes the result of every frame.

    Attributes:
        name: for people.
        essential: whether it is a reason to go on: a run whose last such sink failed ends.
    """

    name = ""
    essential = True

    @abstractmethod
    def write(self, result: Result) -> None:
        """Takes one frame's result; does not change its image.

        Raises:
            OSError: it cannot be written; what was written before is safe.
        """

    def skip(self, frame: Captured) -> None:  # noqa: B027
        """Hears of a frame that could not be used."""

    def close(self) -> None:  # noqa: B027
        """Completes what was written."""

    def discard(self) -> None:
        """Closes without leaving anything behind: the run did not begin."""
        self.close()


def _beside(path: Path) -> Path:
    """Where a file is written until it is complete; another process's is another."""
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write {path.name} into")
    return path.with_name(f".{path.stem}.{os.getpid()}.part{path.suffix}")


class RowFile:
    """A text file that grows by whole rows or not at all.

    Each row goes to the system at once: a process that is killed loses none. A row that does not
    fit on the disk any more is taken back as a whole.
    """

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = _beside(path)
        self._descriptor = os.open(self._part, os.O_WRONLY | os.O_CREAT | os.O_TRUNC, 0o644)
        self._size = 0

    def append(self, row: str) -> None:
        """Adds a row, its line end included.

        Raises:
            OSError: the disk is full or gone.
        """
        data = row.encode()
        try:
            if os.write(self._descriptor, data) < len(data):
                raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        except OSError:
            os.ftruncate(self._descriptor, self._size)
            raise
        self._size += len(data)

    def close(self) -> None:
        """Completes the file."""
        os.close(self._descriptor)
        os.replace(self._part, self.path)

    def discard(self) -> None:
        """Removes it; an older file of that name stays."""
        os.close(self._descriptor)
        os.unlink(self._part)


def csv_row(frame: int, track: Track, target: Optional[int] = None) -> str:
    """``frame,x,y,w,h,score,state`` and, if given, ``,target``; with the line's end."""
    x, y, w, h = track.box
    last = "" if target is None else f",{target}"
    return f"{frame},{x:.2f},{y:.2f},{w:.2f},{h:.2f},{track.score:.4f},{track.state.value}{last}\n"


class BoxWriter(Sink):
    """Writes a row per frame and target, frames counted from 0.

    Args:
        path: of the file.
        several: add a last column ``target``; without it the file is one target's.
    """

    def __init__(self, path: Path, several: bool = False) -> None:
        self.name = str(path)
        self._several = several
        self._rows = RowFile(path)
        self._rows.append(CSV_HEADER + (",target" if several else "") + "\n")

    def write(self, result: Result) -> None:
        """See ``Sink``."""
        for number, track in result.tracks.items():
            self._rows.append(csv_row(result.frame.number, track, number if self._several else None))

    def close(self) -> None:
        """See ``Sink``."""
        self._rows.close()

    def discard(self) -> None:
        """See ``Sink``."""
        self._rows.discard()


class VideoWriter(Sink):
    """Writes the annotated frames as a video of the size of the first; others are resized to it.

    Args:
        path: ``.mp4``, ``.avi`` or ``.mkv``.
        fps: nominal rate; 30 if it makes no sense.
    """

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix.lower() not in (".mp4", ".avi", ".mkv"):
            raise UsageError(f"the output video is .mp4, .avi or .mkv, not {path.name}")
        self.name = str(path)
        self.path = path
        self._part = _beside(path)
        self._fps = fps if 1 <= fps <= 1000 else 30.0
        self._writer: Optional[cv2.VideoWriter] = None
        self._size = (0, 0)
        self._checked = -1.0

    def write(self, result: Result) -> None:
        """See ``Sink``. Frames without a picture are left out."""
        image = result.frame.image
        if image is not None:
            self.write_image(annotated(image, result))

    def write_image(self, frame: np.ndarray) -> None:
        """Adds a BGR uint8 frame as it is.

        Raises:
            SourceError: the video cannot be encoded here.
            OSError: the disk is almost full.
        """
        now = monotonic()
        if now - self._checked > 0.5:
            self._checked = now
            if shutil.disk_usage(self._part.parent).free < LEAST_FREE:
                raise OSError(errno.ENOSPC, "the disk is almost full", str(self.path))
        if self._writer is None:
            # Encoders need even sides.
            self._size = (frame.shape[1] // 2 * 2, frame.shape[0] // 2 * 2)
            self._writer = self._open()
        if frame.shape[1::-1] != self._size:
            frame = cv2.resize(frame, self._size)
        self._writer.write(frame)

    def _open(self) -> cv2.VideoWriter:
        code = "MJPG" if self.path.suffix.lower() == ".avi" else "mp4v"
        fourcc = cv2.VideoWriter_fourcc(*code)  # type: ignore[attr-defined]
        writer = cv2.VideoWriter(str(self._part), fourcc, self._fps, self._size)
        if not writer.isOpened():
            raise SourceError(f"cannot encode {self.path}: this OpenCV has no {code} encoder; try an .avi")
        return writer

    def close(self) -> None:
        """Completes the file; without any frame there is none."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self._part, self.path)


class StripWriter(Sink):
    """Keeps six annotated frames and writes them side by side when it is closed.

    Args:
        path: ``.png`` or ``.jpg``.
        length: expected number of frames; None if unknown.
    """

    def __init__(self, path: Path, length: Optional[int]) -> None:
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UsageError(f"the strip is a .png or .jpg, not {path.name}")
        _beside(path)
        self.name = str(path)
        self._path = path
        self._every = max(1, (length or 120) // 6)
        self._count = 0
        self._tiles: List[np.ndarray] = []

    def write(self, result: Result) -> None:
        """See ``Sink``."""
        image = result.frame.image
        if image is not None and self._count % self._every == 0 and len(self._tiles) < 6:
            self._tiles.append(annotated(image, result))
        self._count += 1

    def close(self) -> None:
        """See ``Sink``."""
        if not self._tiles:
            return
        height = min(tile.shape[0] for tile in self._tiles)
        tiles = [cv2.resize(t, (round(t.shape[1] * height / t.shape[0]), height)) for t in self._tiles]
        if not cv2.imwrite(self.name, np.concatenate(tiles, 1)):
            raise SourceError(f"cannot write {self._path}: is the disk full or the folder read-only?")


class Window(Sink):
    """Shows the annotated frames; ``closed`` after q was pressed.

    Raises:
        UsageError: there is no display (when the first frame is shown).
    """

    name = "window"

    def __init__(self) -> None:
        self.closed = False

    def write(self, result: Result) -> None:
        """See ``Sink``."""
        image = result.frame.image
        if image is None:
            return
        try:
            cv2.imshow("asymtrack-track", annotated(image, result))
            self.closed = cv2.waitKey(1) & 0xFF == ord("q")
        except cv2.error:
            raise UsageError("--show needs a display: use --web 8080 or --output FILE instead") from None


def annotated(image: np.ndarray, result: Result) -> np.ndarray:
    """A copy of ``image`` (BGR uint8) with the tracks drawn on it."""
    picture = image.copy()
    for number, track in result.tracks.items():
        label = f"{number}: " if len(result.tracks) > 1 else ""
        draw_track(picture, track, number, label)
    return picture
