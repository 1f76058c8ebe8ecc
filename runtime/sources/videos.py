"""Folders of images, videos, and URLs: recordings, which have an end, and live streams."""

from __future__ import annotations

import base64
import math
import os
import re
import zlib
from http.client import HTTPException
from mmap import ACCESS_READ, mmap
from pathlib import Path
from time import monotonic
from typing import BinaryIO, Iterator, Optional, Tuple
from urllib.parse import unquote, urlsplit
from urllib.request import Request, urlopen

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, without_secrets
from asymtrack_edge.files import IMAGE_SUFFIXES, list_files, open_video, printable, read_image
from asymtrack_edge.runtime.sources.reader import LiveSource, Source, frame_rate

STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")  #: schemes that FFmpeg reads
STREAM_TIMEOUT = 5000  #: milliseconds after which a silent stream counts as gone (when opening it, and for each frame)
_LONGEST_GAP = 1000  #: consecutive unreadable frames after which a video is given up, whatever length it announces
_PATIENCE = 1.0  #: seconds: a server is given up after a slower failed read; further reads would take as long
_TURNS = {90: cv2.ROTATE_90_CLOCKWISE, 180: cv2.ROTATE_180, 270: cv2.ROTATE_90_COUNTERCLOCKWISE}


def open_path(source: str) -> Source:
    """Opens a video file or a folder of images."""
    path, name = Path(source), printable(source)
    if not os.path.exists(path):
        raise SourceError(f"there is no file or folder {name}")
    folder = os.path.isdir(path)
    if not os.access(path, os.R_OK | (os.X_OK if folder else 0)):
        raise SourceError(f"cannot read {name}: permission denied")
    if folder:
        return ImageFolder(path)
    if path.suffix.lower() in IMAGE_SUFFIXES:
        raise SourceError(f"{name} is a single image: give the folder it is in, or a video")
    capture = open_video(path)
    if not capture.isOpened() or _codec(capture) == "ansi":  # FFmpeg renders text files as video
        raise SourceError(f"cannot decode {name}: not a video, a format unknown to this OpenCV, or never finished")
    return Video(capture, name, path)


def open_stream(url: str) -> Source:
    """Opens a live stream, or a recording over HTTP, which has an end and is read like a file."""
    scheme, _, rest = url.partition("://")
    url = f"{scheme.lower()}://{rest}"  # FFmpeg knows schemes in lower case only
    shown = without_secrets(re.sub(r"[\s\"']", "%20", url))  # else the text after such a character is shown
    http = url.startswith("http")
    recording = http and _has_end(url)
    # A playlist's pictures arrive in files of up to ten seconds or so; a new connection starts some files back.
    timeout = STREAM_TIMEOUT * (4 if re.search(r"\.(m3u8|mpd)\b", url, re.IGNORECASE) else 1)
    ready = [_connect(url, shown, timeout)]
    # RTSP announces made-up lengths.
    if recording or (http and 0 < ready[0].get(cv2.CAP_PROP_FRAME_COUNT) < 1e9):
        return Video(ready[0], shown)
    stream = _Stream(shown, lambda: ready.pop() if ready else _connect(url, shown, timeout))
    stream.timeout = timeout / 1000
    return stream


class ImageFolder(Source):
    """The visible images of a folder in the natural order of their names (``2.jpg`` before ``10.jpg``).

    All 16-bit images are stretched alike, by the range of values in the first image.
    """

    def __init__(self, folder: Path) -> None:
        self.name = printable(folder)
        try:
            self.files = list_files(folder)
        except OSError as error:
            raise SourceError(f"cannot read {self.name}: {error.strerror}") from None
        if not self.files:
            raise SourceError(f"there are no images in {self.name}: expected {', '.join(IMAGE_SUFFIXES)}")
        self.length = len(self.files)

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        return (read_image(file, self.files[0]) for file in self.files)


class Video(Source):
    """A video with an end, read by OpenCV and turned upright, as players show it; without ``path`` over HTTP.

    A frame that cannot be decoded is None if a later one can be decoded, as in intra-coded videos.
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
        given, failed, latest, gone = 0, 0, -1.0, False
        while True:
            began = monotonic()
            try:
                good, frame = self._capture.read()
            except cv2.error:  # a frame larger than OpenCV accepts
                good = False
            # After a time-out, OpenCV first returns the frames that its decoder has kept.
            gone |= self._path is None and monotonic() - began > (STREAM_TIMEOUT / 1000 if good else _PATIENCE)
            if not good:
                if gone or given + failed == self.length or failed >= _LONGEST_GAP:
                    break
                failed += 1
                continue
            self.pts = None
            yield from [None] * failed
            given, failed = given + failed + 1, 0
            # Streams without a clock report 0 for all frames.
            time = self._capture.get(cv2.CAP_PROP_POS_MSEC) / 1000
            if time > latest:
                self.pts = latest = time
            yield frame if self._turn is None else cv2.rotate(frame, self._turn)
        if not given:
            codec, file = _codec(self._capture), self._path is not None and self._path.is_file()
            elsewhere = "its server has stopped sending" if gone else "send it as mkv or fragmented mp4"
            advice = "convert it to H.264" if file else elsewhere
            raise SourceError(f"{self.name} has no frame (left) that OpenCV can decode ({codec}): {advice}")
        self.missing = max(0, (self.length or 0) - given)
        if self._path is not None:
            self.damaged = self.missing > 0 and _is_damaged(self._path, self.missing)
        elif self.missing or self.length is None:
            self.damaged = gone or latest + 1 < (self.length or 0) / (self.fps or math.inf)

    def close(self) -> None:
        self._capture.release()


def _codec(capture: cv2.VideoCapture) -> str:
    return int(capture.get(cv2.CAP_PROP_FOURCC)).to_bytes(4, "little", signed=True).decode("latin1")


def _turn(capture: cv2.VideoCapture) -> Optional[int]:
    """The rotation that makes frames upright; OpenCV's own, which differs between versions, is switched off."""
    if not capture.set(cv2.CAP_PROP_ORIENTATION_AUTO, 0):
        return None
    clockwise = int(capture.get(cv2.CAP_PROP_ORIENTATION_META))
    return _TURNS.get(-clockwise % 360 if cv2.__version__.startswith("4.6.") else clockwise)


def _is_damaged(path: Path, missing: int) -> bool:
    """Whether a file is truncated or damaged. If not, the announced number is an estimate or counts hidden frames."""
    if not path.is_file():  # opening a FIFO would wait for another writer
        return not path.exists()
    size = path.stat().st_size
    with open(path, "rb") as file:
        head, end = file.read(8), 0
        if head[:4] == b"RIFF":  # in its index, empty chunks stand for repeated frames
            with mmap(file.fileno(), 0, access=ACCESS_READ) as data:
                repeated = re.findall(rb"\d\dd[bc].{8}\0{4}", data[data.rfind(b"idx1") :], re.DOTALL)
            return missing > 1 + len(repeated) or 8 + int.from_bytes(head[4:], "little") > size
        if head[:4] == b"\x1a\x45\xdf\xa3":  # Matroska, WebM: a header, then one segment with the rest
            file.seek(4)
            file.seek(_matroska_size(file), os.SEEK_CUR)
            return file.read(4) == b"\x18\x53\x80\x67" and _matroska_size(file) > size - file.tell()
        if head[4:] not in (b"ftyp", b"moov", b"mdat", b"wide", b"free", b"skip"):
            return False
        while end + 8 <= size:  # from box to box of an mp4
            file.seek(end)
            head = file.read(16)
            length = int.from_bytes(head[8:] if head[:4] == b"\0\0\0\1" else head[:4], "big")
            if length < 8:
                return length > 0  # 0: the box extends to the end of the file
            end += length
    return end > size


def _matroska_size(file: BinaryIO) -> int:
    """Reads the size of an element (RFC 8794, section 4); 0 where it is unknown."""
    first = (file.read(1) or b"\0")[0]
    more = min(7, 8 - first.bit_length())
    value = int.from_bytes(bytes([first & (1 << 7 - more) - 1]) + file.read(more), "big")
    return 0 if value == (1 << 7 * (more + 1)) - 1 else value


class _Stream(LiveSource):
    """A live stream. If its last two connections gave the same moving frames, it is a recording, and ends."""

    timeout = STREAM_TIMEOUT / 1000  #: that of ``connect``, in seconds
    _count = _first = 0
    _moved = False
    _before = (0, 0)

    def read(self) -> Optional[Tuple[Optional[np.ndarray], float]]:
        began, tries, read = monotonic(), 0, None
        # OpenCV reports a damaged picture like a lost stream, but the next picture comes sooner than a new connection.
        while read is None and tries < _LONGEST_GAP and monotonic() - began < self.timeout:
            read, tries = super().read(), tries + 1
        if monotonic() - began > self.timeout:
            read = None  # after a time-out, OpenCV returns old frames that its decoder has kept, one per time-out
        if read is None:
            given = self._first, self._count
            self.ended = self._moved and self._count > 1 and given == self._before
            self._before, self._count, self._moved = given, 0, False
        else:
            if read[0] is not None and not self._moved:
                value = zlib.crc32(read[0][::16].tobytes())  # computed for every frame until something moves
                self._first = self._first if self._count else value
                self._moved = value != self._first
            self._count += 1
        return read


def _has_end(url: str) -> bool:
    """Whether an HTTP server states a length, as it does for a file but not for a camera."""
    try:
        parts = urlsplit(url)
        bare = parts._replace(netloc=parts.netloc.rpartition("@")[2]).geturl()
        request = Request(bare, headers={"Range": "bytes=0-0"})  # only the response's head is read
        if parts.username is not None:
            login = f"{unquote(parts.username)}:{unquote(parts.password or '')}".encode()
            # Not sent to a host that the server redirects to.
            request.add_unredirected_header("Authorization", f"Basic {base64.b64encode(login).decode()}")
        with urlopen(request, timeout=STREAM_TIMEOUT / 1000) as answer:
            live = re.search(r"^(image|multipart)/|mpegurl|dash\+xml", answer.headers.get_content_type())
            return not live and answer.headers.get("Content-Length") is not None
    except (OSError, ValueError, HTTPException):
        return False


def _connect(url: str, shown: str, timeout: int) -> cv2.VideoCapture:
    # A recording's server may close the connection while the run is paused. The first option is OpenCV's default.
    os.environ.setdefault("OPENCV_FFMPEG_CAPTURE_OPTIONS", "rtsp_flags;prefer_tcp|reconnect;1")
    timeouts = (cv2.CAP_PROP_OPEN_TIMEOUT_MSEC, STREAM_TIMEOUT, cv2.CAP_PROP_READ_TIMEOUT_MSEC, timeout)
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, timeouts)
    if not capture.isOpened():
        raise SourceError(f"cannot open {shown}: is the server up, and are path and password right?")
    return capture
