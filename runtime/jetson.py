"""Frames that never leave a Jetson's GPU: ``jetson://`` sources, and the sink that encodes and sends them.

jetson-utils (github.com/dusty-nv/jetson-utils) decodes in hardware and leaves the frames in CUDA memory.
"""

from __future__ import annotations

import os
import re
from collections import deque
from pathlib import Path
from typing import Any, Deque, Dict, Optional, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, without_secrets
from asymtrack_edge.runtime.backends.cuda.driver import CAPTURE_LOCK
from asymtrack_edge.runtime.outputs import Result, Sink
from asymtrack_edge.runtime.outputs.pictures import colour_of
from asymtrack_edge.runtime.sources.cameras import split_options
from asymtrack_edge.runtime.sources.reader import LiveSource, Source
from asymtrack_edge.runtime.tracker import State

TIMEOUT = 5000  #: milliseconds without a frame after which the source counts as gone
#: jetson-utils soon overwrites its frames. Our copy of a frame stays valid for this many captures, which is
#: more than the reader reads ahead.
KEPT = 16
_OPTIONS = {"width": "--input-width", "height": "--input-height", "fps": "--input-rate"}


def jetson_utils() -> Any:
    """Imports the module; ``SourceError`` if it is not installed or does not work on this machine."""
    try:
        import jetson_utils
    except (ImportError, RuntimeError, SystemError) as error:  # the last two if built for another numpy
        raise SourceError(
            f"jetson:// needs jetson-utils ({error}): build it on the Jetson (github.com/dusty-nv/jetson-utils) with "
            "the numpy of this environment, or leave out jetson://"
        ) from None
    return jetson_utils


def open_jetson(source: str) -> Source:
    """Opens ``jetson://csi://0?width=1280&height=720&fps=60``, ``jetson://rtsp://host/path``, ``jetson://file.mp4``."""
    uri = re.sub("^file://", "", source[len("jetson://") :])
    # In the address of a stream, what follows a ? is meant for the server.
    ours = re.match(r"(?!\w+://)|csi:|v4l2:", uri)
    name, options = split_options(uri, _OPTIONS, "a jetson:// source") if ours else (uri, {})
    recording = "://" not in name and not name.startswith("/dev/")
    if recording and not os.path.isfile(name):
        raise SourceError(f"there is no file {name}")
    shown = name if re.match("csi:|v4l2:|/dev/", name) else without_secrets(name)
    opened = LiveSource(f"{shown} by jetson-utils", lambda: _JetsonCapture(name, options))
    opened.live = not recording  # a file is decoded in hardware too, at its own pace, but has an end
    return opened


class JetsonFrame:
    """A ``cudaImage`` (rgb8 or bgr8) as a frame: the tracker reads it in place, everything else gets a copy."""

    def __init__(self, image: Any) -> None:
        self.image = image
        self.shape: Tuple[int, int, int] = tuple(image.shape)
        self.format: str = image.format

    @property
    def __cuda_array_interface__(self) -> Any:
        return self.image.__cuda_array_interface__

    def copy(self) -> np.ndarray:
        """The frame on the host: BGR uint8 ``(H, W, 3)``."""
        module = jetson_utils()
        with CAPTURE_LOCK:
            module.cudaDeviceSynchronize()
        pixels = module.cudaToNumpy(self.image)
        return cv2.cvtColor(pixels, cv2.COLOR_RGB2BGR) if self.format == "rgb8" else np.array(pixels)

    def __array__(self, dtype: Any = None, copy: Optional[bool] = None) -> np.ndarray:
        return self.copy()


def _copy(image: Any, into: Any) -> Any:
    """Copies a ``cudaImage``, into the memory of ``into`` if its size and format match."""
    utils, shape = jetson_utils(), {name: getattr(image, name) for name in ("width", "height", "format")}
    if into is None or shape != {name: getattr(into, name) for name in shape}:
        into = utils.cudaAllocMapped(**shape)
    utils.cudaMemcpy(into, image)
    return into


class _JetsonCapture:
    """A ``videoSource`` of jetson-utils with the methods of ``cv2.VideoCapture`` that a live source calls."""

    def __init__(self, uri: str, options: Dict[str, str]) -> None:
        self._utils = jetson_utils()
        try:
            self._source = self._utils.videoSource(uri, [f"{_OPTIONS[n]}={value}" for n, value in options.items()])
        except Exception as error:  # it raises plain exceptions, and logs the reason
            raise SourceError(without_secrets(f"jetson-utils cannot open {uri}: {error}")) from None
        self._ring: Deque[Any] = deque([None] * KEPT)

    def grab(self) -> bool:
        try:
            # In the default format, on the GPU: the tracker swaps the channels there.
            self._latest = self._source.Capture(timeout=TIMEOUT)
        except Exception:  # end of stream; versions that do not return None after a time-out raise it then, too
            self._latest = None
        return self._latest is not None

    def retrieve(self) -> Tuple[bool, Any]:
        """The frame of the last ``grab``, copied into memory that stays valid for ``KEPT`` captures."""
        self._ring.append(_copy(self._latest, self._ring.popleft()))
        return True, JetsonFrame(self._ring[-1])

    def get(self, prop: int) -> float:
        return float(self._source.GetFrameRate()) if prop == cv2.CAP_PROP_FPS else 0.0

    def release(self) -> None:
        self._source.Close()


class JetsonWriter(Sink):
    """Draws the boxes on the GPU, and encodes or sends the frames from there.

    ``where`` is an output that jetson-utils knows: ``file.mp4``, ``rtp://host:port``,
    ``webrtc://@:8554/out``, ``display://0``. An existing file is overwritten from the start.
    """

    def __init__(self, where: Path) -> None:
        url = re.sub(r"^(\w+):/(?!/)", r"\1://", str(where))  # a Path has swallowed a slash
        self.name, self._utils, self._picture = without_secrets(url), jetson_utils(), None
        try:
            self._output = self._utils.videoOutput(url, ["--headless"])  # else it also opens a window
        except Exception as error:  # it raises plain exceptions, and logs the reason
            raise SourceError(without_secrets(f"jetson-utils cannot write {url}: {error}")) from None

    def write(self, result: Result) -> None:
        """Draws into a copy, because others may still read the frame."""
        frame: Any = result.frame.image
        self._picture = _copy(frame.image, self._picture)
        for target, track in result.tracks.items():
            colour, (x, y, w, h) = (*colour_of(track, target)[::-1], 255), track.box  # it draws only into RGB
            corners = ((x, y), (x + w, y), (x + w, y + h), (x, y + h), (x, y))
            for start, end in zip(corners, corners[1:]):
                self._utils.cudaDrawLine(self._picture, start, end, colour, 1 if track.state is State.LOST else 3)
        try:
            self._output.Render(self._picture)
        except Exception as error:  # it raises plain exceptions
            raise OSError(f"jetson-utils cannot write it: {error}") from None
        if not self._output.GetWidth():  # jetson-utils replaces an output that it cannot open by one that does nothing
            raise OSError("jetson-utils cannot write it: its messages above say why")

    def close(self, keep: bool = True) -> None:
        self._output.Close()
