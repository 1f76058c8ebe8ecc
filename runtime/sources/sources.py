"""Where frames come from: files, folders of images, cameras, streams and GStreamer pipelines."""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from pathlib import Path
from time import monotonic
from types import TracebackType
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple, Type
from urllib.parse import parse_qsl

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError

IMAGE_SUFFIXES = {".jpg", ".jpeg", ".png", ".bmp", ".webp", ".tif", ".tiff"}

#: Schemes read by OpenCV's FFmpeg as a stream.
STREAM_SCHEMES = ("rtsp", "rtsps", "rtmp", "http", "https", "udp", "tcp", "srt")

#: Milliseconds after which a silent stream counts as gone (opening it, and each frame of it).
STREAM_TIMEOUT = 5000


class Stamped(NamedTuple):
    """A frame and the moment (``time.monotonic``) at which it reached this process."""

    image: Optional[np.ndarray]
    received: float


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

    def close(self) -> None:  # noqa: B027
        """Releases the file or device."""

    def __enter__(self) -> Source:
        return self

    def __exit__(
        self,
        kind: Optional[Type[BaseException]],
        error: Optional[BaseException],
        trace: Optional[TracebackType],
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
            wanted = ", ".join(sorted(IMAGE_SUFFIXES))
            raise SourceError(f"there are no images in {folder}: expected {wanted}")
        self.length = len(self.files)

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        for path in self.files:
            try:
                yield cv2.imread(str(path), cv2.IMREAD_COLOR)
            except cv2.error:  # a header that promises an image larger than OpenCV accepts
                yield None


class Video(Source):
    """A video file, through OpenCV. A frame that the decoder gives up on ends it."""

    def __init__(self, capture: cv2.VideoCapture, name: str) -> None:
        self._capture = capture
        self.name = name
        self.fps = _frame_rate(capture)
        count = int(capture.get(cv2.CAP_PROP_FRAME_COUNT) or 0)
        self.length = count if count > 0 else None

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        while True:
            good, frame = self._capture.read()
            if not good:
                return
            yield frame

    def close(self) -> None:
        """Releases the file."""
        self._capture.release()


class LiveSource(Source):
    """A camera or stream that can be connected again after it went away.

    Args:
        name: for people.
        connect: opens it: returns what has the methods ``grab``, ``retrieve``, ``release`` and
            ``get`` of ``cv2.VideoCapture``, or raises ``SourceError``.

    Raises:
        SourceError: it cannot be opened now.
    """

    live = True

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        self.name = name
        self._connect = connect
        self._capture = connect()
        self.fps = _frame_rate(self._capture)

    def read(self) -> Optional[Stamped]:
        """Waits for the next frame; None when the source has gone away.

        The time stamp is taken before the picture is converted to BGR.
        """
        if not self._capture.grab():
            return None
        received = monotonic()
        good, image = self._capture.retrieve()
        return Stamped(image if good else None, received)

    def reconnect(self) -> None:
        """Opens the source anew.

        Raises:
            SourceError: it cannot be opened now; it may be tried again.
        """
        self._capture.release()
        self._capture = self._connect()

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        while True:
            stamped = self.read()
            if stamped is None:
                return
            yield stamped.image

    def close(self) -> None:
        """Releases the device or connection."""
        self._capture.release()


def open_source(source: str) -> Source:
    """Opens what a user names.

    - a video file, or a folder of images;
    - a camera: ``0`` or ``/dev/video0``, with ``?width=1280&height=720&fps=60&format=MJPG`` at will;
    - ``rtsp://...``, ``http://...`` and other URLs that FFmpeg reads;
    - ``csi://0?width=1280&height=720&fps=30&flip=0``: a ribbon-cable camera of a Jetson;
    - a GStreamer pipeline (anything with `` ! `` in it), with or without an ``appsink`` at its end.

    Raises:
        SourceError: it does not exist or cannot be decoded.
        UsageError: an option after ``?`` is unknown.
    """
    from asymtrack_edge.runtime.sources import pipelines

    if source.startswith("csi://"):
        sensor, options = _options(source[len("csi://") :])
        pipeline = pipelines.csi_pipeline(sensor, options)
        return LiveSource(f"CSI camera {sensor}", lambda: pipelines.open_pipeline(pipeline))
    if " ! " in source:
        return LiveSource("GStreamer pipeline", lambda: pipelines.open_pipeline(source))
    device, options = _options(source)
    if re.fullmatch(r"\d+|/dev/video\w+", device):
        return LiveSource(f"camera {device}", lambda: _open_camera(device, options))
    if re.match(rf"({'|'.join(STREAM_SCHEMES)})://", source):
        return _open_stream(source)
    return _open_path(source)


def _open_path(source: str) -> Source:
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
    return Video(capture, str(path))


def _open_camera(device: str, options: Dict[str, str]) -> cv2.VideoCapture:
    index = device if device.startswith("/dev/") else int(device)
    capture = cv2.VideoCapture(index, getattr(cv2, "CAP_V4L2", cv2.CAP_ANY))
    if not capture.isOpened():
        node = device if device.startswith("/dev/") else f"/dev/video{device}"
        raise SourceError(f"cannot open camera {device}: is it connected, free, and is {node} readable?")
    settings: Dict[str, Tuple[int, Callable[[str], float]]] = {
        # The format first: it decides which sizes and rates there are.
        "format": (cv2.CAP_PROP_FOURCC, lambda code: cv2.VideoWriter_fourcc(*code)),  # type: ignore[attr-defined]
        "width": (cv2.CAP_PROP_FRAME_WIDTH, float),
        "height": (cv2.CAP_PROP_FRAME_HEIGHT, float),
        "fps": (cv2.CAP_PROP_FPS, float),
    }
    for name in options:
        if name not in settings:
            raise UsageError(f"unknown camera option {name!r}: choose among {', '.join(settings)}")
    for name, (prop, convert) in settings.items():
        if name in options:
            try:
                capture.set(prop, convert(options[name]))
            except (TypeError, ValueError):
                raise UsageError(f"camera option {name} cannot be {options[name]!r}") from None
    return capture


def _open_stream(url: str) -> Source:
    shown = without_password(url)
    first = _connect_stream(url, shown)
    # A file behind HTTP has an end and waits for us; RTSP announces made-up lengths.
    if url.startswith("http") and 0 < first.get(cv2.CAP_PROP_FRAME_COUNT) < 1e9:
        return Video(first, shown)
    ready = [first]
    return LiveSource(shown, lambda: ready.pop() if ready else _connect_stream(url, shown))


def _connect_stream(url: str, shown: str) -> cv2.VideoCapture:
    parameters: List[int] = []
    for name in ("CAP_PROP_OPEN_TIMEOUT_MSEC", "CAP_PROP_READ_TIMEOUT_MSEC"):
        prop = getattr(cv2, name, None)  # OpenCV before 4.5.2 waits 30 seconds instead
        if prop is not None:
            parameters += [prop, STREAM_TIMEOUT]
    capture = cv2.VideoCapture(url, cv2.CAP_FFMPEG, parameters) if parameters else cv2.VideoCapture(url)
    if not capture.isOpened():
        raise SourceError(f"cannot open {shown}: is the server up, the path right, the password too?")
    return capture


def without_password(url: str) -> str:
    """``rtsp://user:secret@host/`` as ``rtsp://user:***@host/``, for messages and logs."""
    return re.sub(r"(://[^/@:]*):[^/]*@", r"\1:***@", url)


def _options(text: str) -> Tuple[str, Dict[str, str]]:
    name, _, query = text.partition("?")
    return name, dict(parse_qsl(query))


def _frame_rate(capture: Any) -> float:
    fps = float(capture.get(cv2.CAP_PROP_FPS) or 0)
    return fps if 0 < fps <= 1000 else 0.0  # FFmpeg says 90000 where a stream does not tell


def _natural(path: Path) -> List[object]:
    parts = re.split(r"(\d+)", path.name)
    return [int(part) if i % 2 else part for i, part in enumerate(parts)]
