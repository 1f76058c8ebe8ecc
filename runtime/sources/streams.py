"""URLs: live streams, and recordings behind HTTP."""

from __future__ import annotations

import base64
import re
import zlib
from http.client import HTTPException
from typing import Any, Callable, List, Optional, Tuple
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, without_secrets
from asymtrack_edge.runtime.sources.base import LiveSource, Source
from asymtrack_edge.runtime.sources.files import Video

#: Schemes read by OpenCV's FFmpeg as a stream.
STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")

#: Milliseconds after which a silent stream counts as gone (opening it, and each frame of it).
STREAM_TIMEOUT = 5000


def open_stream(url: str) -> Source:
    """Opens a live stream, or a recording behind HTTP, which has an end and is read like a file.

    Raises:
        SourceError: it cannot be opened now.
    """
    shown = without_secrets(url.replace(" ", "%20"))  # else what stands behind a blank is shown
    http = url.startswith("http")
    recording = http and _has_end(url)
    first = _connect(url, shown)
    # RTSP announces made-up lengths.
    if recording or (http and 0 < first.get(cv2.CAP_PROP_FRAME_COUNT) < 1e9):
        return Video(first, shown)
    ready = [first]
    return _Stream(shown, lambda: ready.pop() if ready else _connect(url, shown))


class _Stream(LiveSource):
    """A live stream. If it gives the same frames twice it is a recording, and ends."""

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        super().__init__(name, connect)
        self._count = self._first = 0
        self._before = (0, 0)

    def read(self) -> Optional[Tuple[Optional[np.ndarray], float]]:
        """Also compares how a connection began, and how many frames it gave, with the one before."""
        read = super().read()
        if read is None:
            given = self._first, self._count
            self.ended = self._count > 1 and given == self._before
            self._before, self._count = given, 0
        else:
            if not self._count and read[0] is not None:
                self._first = zlib.crc32(read[0].tobytes())
            self._count += 1
        return read


def _has_end(url: str) -> bool:
    """Whether an HTTP server states a length, as it does for a file and not for a camera."""
    try:
        parts = urlsplit(url)
        headers = {"Range": "bytes=0-0"}  # for the response's head; no more of it is read
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            headers["Authorization"] = f"Basic {base64.b64encode(login).decode()}"
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        with urlopen(Request(bare, headers=headers), timeout=STREAM_TIMEOUT / 1000) as answer:
            kind = answer.headers.get_content_type()
            sized = answer.headers.get("Content-Length") is not None
    except (OSError, ValueError, HTTPException):
        return False
    return sized and not re.search(r"^(image|multipart)/|mpegurl|dash\+xml", kind)


def _connect(url: str, shown: str) -> cv2.VideoCapture:
    parameters: List[int] = []
    for name in ("CAP_PROP_OPEN_TIMEOUT_MSEC", "CAP_PROP_READ_TIMEOUT_MSEC"):
        prop = getattr(cv2, name, None)  # OpenCV before 4.5.2 waits 30 seconds instead
        if prop is not None:
            parameters += [prop, STREAM_TIMEOUT]
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, *([parameters] if parameters else []))
    if not capture.isOpened():
        raise SourceError(f"cannot open {shown}: is the server up, the path right, the password too?")
    return capture
