"""Where frames come from: a video file, a folder of images, a camera."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from types import TracebackType
from typing import Iterator, List, Optional, Type

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}


class Source(ABC):
    """Frames in order, as BGR uint8 ``(H, W, 3)``; None stands for a frame that cannot be read.

    Attributes:
        name: for people.
        fps: nominal frames per second; 0 if unknown.
        length: number of frames; None if unknown or endless.
        live: frames come when they come (a camera), not when they are asked for.
    """

    name = ""
    fps = 0.0
    length: Optional[int] = None
    live = False

    @abstractmethod
    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        """Yields the frames."""

    def close(self) -> None:
        """Releases the file or device."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self, kind: Optional[Type[BaseException]], error: Optional[BaseException], trace: Optional[TracebackType]
    ) -> None:
        self.close()


class ImageFolder(Source):
    """The images of a folder in the natural order of their names (``2.jpg`` before ``10.jpg``)."""

    def __init__(self, folder: Path) -> None:
        self.name = str(folder)
        self.files: List[Path] = sorted(
            (p for p in folder.iterdir() if p.suffix.lower() in IMAGE_SUFFIXES), key=_natural
        )
        if not self.files:
            raise SourceError(f"there are no images in {folder}: expected {', '.join(sorted(IMAGE_SUFFIXES))}")
        self.length = len(self.files)

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        for path in self.files:
            yield cv2.imread(str(path), cv2.IMREAD_COLOR)


class Video(Source):
    """A video file or camera, through OpenCV."""

    def __init__(self, capture: cv2.VideoCapture, name: str, live: bool) -> None:
        self._capture = capture
        self.name = name
        self.live = live
        self.fps = float(capture.get(cv2.CAP_PROP_FPS) or 0)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT) or 0)
        self.length = count if count > 0 and not live else None

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        while True:
            good, frame = self._capture.read()
            if not good:
                return
            yield frame

    def close(self) -> None:
        """Releases the file or device."""
        self._capture.release()


def _natural(path: Path) -> List[object]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]


def open_source(source: str) -> Source:
    """Opens a folder of images, a video file, or a camera by its index.

    Raises:
        SourceError: it does not exist or cannot be decoded.
    """
    if re.fullmatch(r"\d+", source):
        capture = cv2.VideoCapture(int(source))
        if not capture.isOpened():
            raise SourceError(f"cannot open camera {source}: is it connected, and is /dev/video{source} readable?")
        return Video(capture, f"camera {source}", live=True)
    path = Path(source)
    if path.is_dir():
        return ImageFolder(path)
    if not path.exists():
        raise SourceError(f"there is no file or folder {source}")
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(f"{source} is a single image: give the folder it is in, or a video")
    capture = cv2.VideoCapture(str(path))
    if not capture.isOpened():
        raise SourceError(f"cannot decode {source}: not a video, or of a format this OpenCV cannot read")
    return Video(capture, str(path), live=False)
