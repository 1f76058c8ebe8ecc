"""What a source of frames is: one that can wait, or a live one."""

from __future__ import annotations

from abc import ABC, abstractmethod
from time import monotonic
from typing import Any, Callable, Iterator, Optional, Tuple

import cv2
import numpy as np


class Source(ABC):
    """Frames in order, as BGR uint8 ``(H, W, 3)``; None stands for a frame that cannot be read.

    Attributes:
        name: shown to people; without passwords.
        fps: nominal frames per second; 0 if unknown.
        length: number of frames that the source announces; None if unknown or endless.
        live: whether frames arrive by themselves, as from a camera, and not when they are asked for.
        pts: time of the latest frame on the source's own clock, in seconds; None without such a clock.
        missing: at the end, the number of announced frames that did not come.
        damaged: at the end, whether they are missing because the file is cut off or damaged.
    """

    name = ""
    fps = 0.0
    length: Optional[int] = None
    live = False
    pts: Optional[float] = None
    missing = 0
    damaged = False

    @abstractmethod
    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        """Yields the frames."""

    def close(self) -> None:  # noqa: B027
        """Releases the file or device."""

    def __enter__(self) -> Source:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()


class LiveSource(Source):
    """A camera or stream that can be connected again after it went away.

    Args:
        name: shown to people.
        connect: opens the source. It returns an object with the methods ``grab``, ``retrieve``, ``release``
            and ``get`` of ``cv2.VideoCapture``, or raises ``SourceError``.

    Attributes:
        ended: whether the source has an end and has reached it; connecting again is of no use.

    Raises:
        SourceError: it cannot be opened now.
    """

    live = True
    ended = False

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        self.name = name
        self._connect = connect
        self._capture = connect()
        self.fps = frame_rate(self._capture)

    def read(self) -> Optional[Tuple[Optional[np.ndarray], float]]:
        """Waits for the next frame; None when the source has gone away.

        Returns:
            The frame, and the moment (``time.monotonic``) at which it reached this process, taken
            before the picture is converted to BGR.
        """
        if not self._capture.grab():
            return None
        received = monotonic()
        good, image = self._capture.retrieve()
        return (image if good else None), received

    def reconnect(self) -> None:
        """Opens the source anew.

        Raises:
            SourceError: it cannot be opened now; it may be tried again.
        """
        self._capture.release()
        self._capture = self._connect()

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        while True:
            read = self.read()
            if read is None:
                return
            yield read[0]

    def close(self) -> None:
        """Releases the device or connection."""
        self._capture.release()


def frame_rate(capture: Any) -> float:
    """Nominal frames per second of a capture; 0 if it does not tell."""
    fps = float(capture.get(cv2.CAP_PROP_FPS) or 0)
    return fps if 0 < fps <= 1000 else 0.0  # FFmpeg says 90000 where a stream does not tell
