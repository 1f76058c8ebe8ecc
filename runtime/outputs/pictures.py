"""Frames with the tracks drawn on them: as a video, as a strip of pictures, in a window."""

from __future__ import annotations

import errno
import os
import shutil
import subprocess
import sys
from contextlib import suppress
from pathlib import Path
from subprocess import DEVNULL
from typing import List, Optional, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.files import OutputFile, check_output, opencv_path, printable, write_image
from asymtrack_edge.runtime.outputs import Result, Sink
from asymtrack_edge.runtime.tracker import State, Track

LEAST_FREE = 32 << 20  #: bytes: encoders do not report a full disk, and need room for their index at the end
#: BGR colours that people with colour blindness can tell apart, too (Okabe and Ito), one per target.
COLOURS = ((0, 159, 230), (233, 180, 86), (115, 158, 0), (66, 228, 240), (178, 114, 0), (0, 94, 213), (167, 121, 204))


def colour_of(track: Track, target: int) -> Tuple[int, int, int]:
    """The BGR colour of a target's box: its own, or grey while it is lost."""
    return (150, 150, 150) if track.state is State.LOST else COLOURS[target % len(COLOURS)]


def annotated(result: Result) -> np.ndarray:
    """A copy of a result's frame (BGR uint8) with the boxes and scores drawn on it; lost targets have thin boxes."""
    assert result.frame.image is not None
    picture = result.frame.image.copy()
    scale = max(0.4, min(picture.shape[:2]) / 900)
    for target, track in result.tracks.items():
        lost, colour = track.state is State.LOST, colour_of(track, target)
        x, y, w, h = (round(v) for v in track.box)
        cv2.rectangle(picture, (x, y), (x + w, y + h), colour, 1 if lost else 2, cv2.LINE_AA)
        text = f"{f'{target}: ' if len(result.tracks) > 1 else ''}{track.score:.2f}{' lost' if lost else ''}"
        at = x, y - 4 if y > 20 else y + h + int(24 * scale)
        for paint, thickness in (((0, 0, 0), 3), (colour, 1)):  # a dark outline keeps it readable on any picture
            cv2.putText(picture, text, at, cv2.FONT_HERSHEY_SIMPLEX, scale, paint, thickness, cv2.LINE_AA)
    return picture


def video_rate(fps: float) -> float:
    """The rate nearest to ``fps`` that MPEG-4's 16-bit time base can hold; 30 if ``fps`` makes no sense."""
    if not 0.01 <= fps <= 1000:
        return 30.0
    return round(fps, 3 if fps < 65 else 2 if fps < 650 else 1)


class VideoWriter(Sink):
    """Writes annotated frames as a constant-rate video, all resized to ``shape`` (H, W, ...)."""

    _written = 0

    def __init__(self, path: Path, fps: float, shape: Tuple[int, ...]) -> None:
        self.name = printable(path)
        if path.suffix.lower() not in (".mp4", ".avi", ".mkv"):
            raise UsageError(f"the output video must be .mp4, .avi or .mkv, not {self.name}")
        if path.is_fifo():
            raise UsageError(f"{self.name} is a pipe: writing a video's index needs a file")
        opencv_path(path.parent)  # the file's own name may be anything
        self._size = (shape[1] // 2 * 2, shape[0] // 2 * 2)  # encoders need even sides
        self._file = OutputFile(path)
        try:
            self._check_disk()
            code = "MJPG" if path.suffix.lower() == ".avi" else "mp4v"
            fourcc = cv2.VideoWriter_fourcc(*code)  # type: ignore[attr-defined]
            self._writer = cv2.VideoWriter(opencv_path(self._file.place), fourcc, video_rate(fps), self._size)
            if not self._writer.isOpened():
                raise SourceError(f"cannot encode {self.name}: OpenCV has no {code} encoder for this size; try .avi")
        except BaseException:
            self._file.discard()
            raise

    def _check_disk(self) -> None:
        room = shutil.disk_usage(self._file.place.parent)
        if room.total and room.free < LEAST_FREE:  # some file systems report no sizes
            raise OSError(errno.ENOSPC, "the disk is almost full", self.name)

    def write(self, result: Result) -> None:
        """Adds the frame; ``OSError`` if the disk is almost full."""
        if self._written % 8 == 0:  # eight large pictures take less than ``LEAST_FREE``
            self._check_disk()
        picture = annotated(result)
        self._writer.write(picture if picture.shape[1::-1] == self._size else cv2.resize(picture, self._size))
        self._written += 1

    def close(self, keep: bool = True) -> None:
        """Completes the file. Without ``keep`` or frames, or at a size limit (no encoder tells), an old one stays."""
        self._writer.release()
        try:
            if keep and self._written:
                self._file.check_growth()
                self._file.close()
        finally:
            self._file.discard()  # does nothing if the file is complete


class StripWriter(Sink):
    """Keeps six of about ``length`` annotated frames and writes them side by side (``.png``, ``.jpg``) when closed."""

    def __init__(self, path: Path, length: Optional[int]) -> None:
        self.name = printable(path)
        if path.suffix.lower() not in (".png", ".jpg", ".jpeg"):
            raise UsageError(f"the strip must be a .png or .jpg, not {self.name}")
        check_output(path)
        self._path = path
        self._every = max(1, (length or 120) // 6)
        self._tiles: List[np.ndarray] = []

    def write(self, result: Result) -> None:
        if len(self._tiles) < 6 and result.frame.number >= len(self._tiles) * self._every:
            self._tiles.append(annotated(result))

    def close(self, keep: bool = True) -> None:
        if self._tiles:
            height = min(tile.shape[0] for tile in self._tiles)
            width = sum(tile.shape[1] * height / tile.shape[0] for tile in self._tiles)
            height = max(1, int(height * min(1, 65_000 / width)))  # JPEG's maximum width
            tiles = [cv2.resize(t, (max(1, round(t.shape[1] * height / t.shape[0])), height)) for t in self._tiles]
            write_image(self._path, np.concatenate(tiles, 1))


class Window(Sink):
    """Shows the annotated frames; pressing q or closing the window ends the run."""

    name = "window"
    _seen = False

    def write(self, result: Result) -> None:
        cv2.imshow("asymtrack-track", annotated(result))
        self.wants_end = cv2.waitKey(1) & 0xFF == ord("q")
        visible = False
        with suppress(cv2.error):  # Qt raises it for a closed window
            visible = cv2.getWindowProperty("asymtrack-track", cv2.WND_PROP_VISIBLE) >= 1
        self.wants_end |= self._seen and not visible
        self._seen |= visible


def check_display(option: str, instead: str) -> None:
    """Tries to open a window in another process: without a display, many OpenCV builds abort the process."""
    # It runs in /, because Python imports from the working directory first: that may be a stranger's folder.
    command = [sys.executable, "-c", "import cv2; cv2.namedWindow('asymtrack'); cv2.destroyAllWindows()"]
    if os.environ.get("DISPLAY") or os.environ.get("WAYLAND_DISPLAY"):
        with suppress(OSError, subprocess.TimeoutExpired):
            if subprocess.call(command, cwd="/", stdin=DEVNULL, stdout=DEVNULL, stderr=DEVNULL, timeout=30) == 0:
                return
    raise UsageError(f"{option} needs a display and an OpenCV build with windows: {instead}")
