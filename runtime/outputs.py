"""What a tracking run leaves behind: boxes as csv, an annotated video.

Files are written beside their final name and renamed when complete. If the run is interrupted they
are completed with what there is, and renamed all the same.
"""

from __future__ import annotations

import os
from pathlib import Path
from typing import Optional

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.runtime.tracker import Track

CSV_HEADER = "frame,x,y,w,h,score,state"


def _beside(path: Path) -> Path:
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write {path.name} into")
    return path.with_name(f".{path.stem}.part{path.suffix}")


class BoxWriter:
    """Writes ``frame,x,y,w,h,score,state`` rows, frames counted from 0."""

    def __init__(self, path: Path) -> None:
        self.path = path
        self._part = _beside(path)
        self._file = open(self._part, "w", encoding="utf-8", newline="\n")
        self._file.write(CSV_HEADER + "\n")

    def write(self, frame: int, track: Track) -> None:
        """Adds one row."""
        x, y, w, h = track.box
        self._file.write(f"{frame},{x:.2f},{y:.2f},{w:.2f},{h:.2f},{track.score:.4f},{track.state.value}\n")

    def close(self) -> None:
        """Completes the file."""
        self._file.close()
        os.replace(self._part, self.path)


class VideoWriter:
    """Writes an mp4 of the size of its first frame; frames of another size are resized to it."""

    def __init__(self, path: Path, fps: float) -> None:
        if path.suffix.lower() not in (".mp4", ".avi", ".mkv"):
            raise UsageError(f"the output video is .mp4, .avi or .mkv, not {path.name}")
        self.path = path
        self._part = _beside(path)
        self._fps = fps if 1 <= fps <= 1000 else 30.0
        self._writer: Optional[cv2.VideoWriter] = None
        self._size = (0, 0)

    def write(self, frame: np.ndarray) -> None:
        """Adds a BGR uint8 frame.

        Raises:
            SourceError: the video cannot be encoded here.
        """
        if self._writer is None:
            # Encoders need even sides.
            self._size = (frame.shape[1] // 2 * 2, frame.shape[0] // 2 * 2)
            code = "MJPG" if self.path.suffix.lower() == ".avi" else "mp4v"
            self._writer = cv2.VideoWriter(str(self._part), cv2.VideoWriter_fourcc(*code), self._fps, self._size)
            if not self._writer.isOpened():
                raise SourceError(f"cannot encode {self.path}: this OpenCV has no {code} encoder; try an .avi")
        if frame.shape[1::-1] != self._size:
            frame = cv2.resize(frame, self._size)
        self._writer.write(frame)

    def close(self) -> None:
        """Completes the file; without any frame there is none."""
        if self._writer is not None:
            self._writer.release()
            os.replace(self._part, self.path)
