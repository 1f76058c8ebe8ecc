"""Videos and folders of images."""

from __future__ import annotations

import os
import re
from pathlib import Path
from time import monotonic
from typing import Iterator, Optional

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError
from asymtrack_edge.files import list_files, open_video, printable, read_image
from asymtrack_edge.runtime.sources.base import Source, frame_rate

IMAGE_SUFFIXES = (".bmp", ".jpeg", ".jpg", ".png", ".tif", ".tiff", ".webp")

#: Unreadable frames in a row after which a video is given up, whatever it announces.
_LONGEST_GAP = 1000

#: Seconds without a frame after which a server gives no other; waiting for each would take as long.
_PATIENCE = 1.0

_VERSION = tuple(int(part) for part in re.findall(r"\d+", cv2.__version__)[:3])

_TURNS = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


class ImageFolder(Source):
    """The visible images of a folder in the natural order of their names (``2.jpg`` before ``10.jpg``)."""

    def __init__(self, folder: Path) -> None:
        self.name = printable(folder)
        try:
            self.files = list_files(folder, IMAGE_SUFFIXES)
        except OSError as error:
            raise SourceError(f"cannot read {self.name}: {error.strerror}") from None
        if not self.files:
            raise SourceError(f"there are no images in {self.name}: expected {', '.join(IMAGE_SUFFIXES)}")
        self.length = len(self.files)

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        return map(read_image, self.files)


class Video(Source):
    """A video with an end, through OpenCV, upright as players show it.

    A frame that cannot be decoded is None if a later one can be decoded, as in intra-coded videos.

    Args:
        capture: an open capture.
        name: shown to people.
        path: path of the file; None for a recording behind HTTP.
    """

    def __init__(self, capture: cv2.VideoCapture, name: str, path: Optional[Path] = None) -> None:
        self._capture = capture
        self._path = path
        self.name = name
        self.fps = frame_rate(capture)
        count = capture.get(cv2.CAP_PROP_FRAME_COUNT) or 0
        self.length = int(count) if 0 < count < 1e9 else None
        self._turn = _turn(capture)

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        given = failed = 0
        latest = -1.0
        while True:
            began = monotonic()
            try:
                good, frame = self._capture.read()
            except cv2.error:  # a frame larger than OpenCV accepts
                good = False
            if not good:
                gone = self._path is None and monotonic() - began > _PATIENCE
                if gone or self.length is None or given + failed >= self.length or failed >= _LONGEST_GAP:
                    break
                failed += 1
                continue
            self.pts = None
            for _ in range(failed):
                yield None
            given, failed = given + failed + 1, 0
            # Streams without a clock say 0 for all frames. Before 4.5.4 it is the number in disguise.
            time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if time > latest and _VERSION >= (4, 5, 4):
                self.pts = latest = time
            yield frame if self._turn is None else cv2.rotate(frame, self._turn)
        self.missing = max(0, (self.length or 0) - given)
        if self.missing:
            self.damaged = gone or (self._path is not None and _is_damaged(self._path, self.missing))

    def close(self) -> None:
        """Releases the file."""
        self._capture.release()


def _turn(capture: cv2.VideoCapture) -> Optional[int]:
    """What makes frames upright; OpenCV's own way, which differs between versions, is switched off."""
    if not capture.set(getattr(cv2, "CAP_PROP_ORIENTATION_AUTO", 49), 0):
        return None
    clockwise = int(capture.get(getattr(cv2, "CAP_PROP_ORIENTATION_META", 48)))
    return _TURNS.get(-clockwise % 360 if _VERSION[:2] == (4, 6) else clockwise)


def _is_damaged(path: Path, missing: int) -> bool:
    """Whether a file with fewer frames than announced is cut off or damaged.

    Elsewhere the number is an estimate, or counts what the file says not to show.
    """
    if not path.exists():
        return False
    with open(path, "rb") as file:
        size = os.fstat(file.fileno()).st_size
        head = file.read(8)
        if head[:4] == b"RIFF":
            return missing > 1 or 8 + int.from_bytes(head[4:], "little") > size
        if head[4:] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return False
        end = 0
        while end + 8 <= size:
            file.seek(end)
            head = file.read(16)
            length = int.from_bytes(head[:4], "big")
            length = int.from_bytes(head[8:], "big") if length == 1 else length
            if length < 8:
                return length > 0  # 0: to the end of the file
            end += length
        return end > size


def open_path(source: str) -> Source:
    """A video file or a folder of images.

    Raises:
        SourceError: there is none of that name, or it cannot be decoded.
    """
    path, name = Path(source), printable(source)
    if os.path.isdir(path):
        return ImageFolder(path)
    if not os.path.exists(path):
        raise SourceError(f"there is no file or folder {name}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(f"{name} is a single image: give the folder it is in, or a video")
    capture = open_video(path)
    if not capture.isOpened():
        raise SourceError(f"cannot decode {name}: not a video, or of a format this OpenCV cannot read")
    return Video(capture, name, path)
