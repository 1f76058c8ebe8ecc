"""What the web view shows: pictures, encoded once for all viewers, and speeds."""

from __future__ import annotations

import threading
from time import monotonic
from typing import Any, Callable, Dict, NamedTuple, Optional

import cv2
import numpy as np

from asymtrack_edge.runtime.outputs.base import Result
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.web.protocol import pack_picture

#: Pictures per second sent to viewers at most; the tracker is not held to it.
RATE = 15.0

#: Pictures are sent no wider than this, in pixels.
WIDTH = 960

_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 75]


class Shown(NamedTuple):
    """A picture as viewers get it.

    Attributes:
        version: of what there was to see; -1 before there is a picture.
        packet: header and JPEG (``web_protocol.pack_picture``).
        number: of the frame.
        image: the frame itself, BGR uint8.
    """

    version: int
    packet: bytes
    number: int
    image: Optional[np.ndarray]


class Pictures:
    """Encodes the newest picture when a viewer asks, once for all of them.

    Attributes:
        encode_seconds: what the last one took.
    """

    def __init__(self) -> None:
        self.encode_seconds = 0.0
        self._lock = threading.Lock()
        self._shown = Shown(-1, b"", -1, None)
        self._began = 0.0

    def due_in(self) -> float:
        """Seconds until another picture may be encoded."""
        return self._began + 1 / RATE - monotonic()

    def show(self, version: int, result: Optional[Result], header: Callable[[Result], Dict[str, Any]]) -> Shown:
        """The picture of ``result`` with its header; that of an earlier call where there is no picture now."""
        with self._lock:
            if self._shown.version == version or result is None or result.frame.image is None:
                return self._shown
            began = self._began = monotonic()
            image = result.frame.image
            good, jpeg = cv2.imencode(".jpg", _shrunk(image), _JPEG)
            if not good:
                return self._shown
            self._shown = Shown(version, pack_picture(header(result), jpeg.tobytes()), result.frame.number, image)
            self.encode_seconds = monotonic() - began
            return self._shown


def _shrunk(image: np.ndarray) -> np.ndarray:
    if image.shape[1] <= WIDTH:
        return image
    size = WIDTH, max(1, round(image.shape[0] * WIDTH / image.shape[1]))
    return cv2.resize(image, size, interpolation=cv2.INTER_AREA)


class Rates:
    """Frames per second and milliseconds by stage over the last second or so."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._since = self._last = monotonic()
        self._frames = 0
        self._latency = 0.0
        self._seconds: Dict[str, float] = {}
        self._shown: Dict[str, Any] = {"fps": 0.0, "stages": {}, "dropped": 0}

    def count(self, result: Result) -> None:
        """Counts a frame."""
        self._frames += 1
        self._latency += result.latency
        now = monotonic()
        if now - self._last > 1:  # the run was paused: begin anew
            self._since, self._frames, self._latency = now, 0, 0.0
            self._seconds = self._run.tracker.seconds
        self._last = now
        if now - self._since < 1:
            return
        seconds = self._run.tracker.seconds
        stages = {
            name: round(1000 * (value - self._seconds.get(name, 0.0)) / self._frames, 2)
            for name, value in seconds.items()
        }
        stages["frame to decision"] = round(1000 * self._latency / self._frames, 2)
        self._shown = {
            "fps": round(self._frames / (now - self._since), 1),
            "stages": stages,
            "dropped": self._run.reader.stats.dropped,
        }
        self._since, self._frames, self._latency, self._seconds = now, 0, 0.0, seconds

    def shown(self) -> Dict[str, Any]:
        """Those of the last full second."""
        return self._shown
