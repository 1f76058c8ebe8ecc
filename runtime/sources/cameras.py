"""Cameras of this machine, and GStreamer pipelines.

Few builds of OpenCV include GStreamer, and those on PyPI never do. So a pipeline runs in a ``gst-launch-1.0``
process and writes I420 pictures, half the size of BGR, into a pipe.
"""

from __future__ import annotations

import fcntl
import os
import re
import select
import shlex
import subprocess
import tempfile
import weakref
from contextlib import suppress
from time import monotonic
from typing import Callable, Collection, Dict, List, Tuple
from urllib.parse import parse_qsl

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError, without_secrets

START_TIMEOUT = 10.0  #: seconds without a byte after which a pipeline counts as gone, while it starts
READ_TIMEOUT = 5.0  #: the same while it runs


def split_options(text: str, known: Collection[str], owner: str) -> Tuple[str, Dict[str, str]]:
    """Splits ``0?width=1280&fps=60`` into ``"0"`` and options; ``UsageError`` for one that ``owner`` does not have."""
    name, _, query = text.partition("?")
    options = dict(parse_qsl(query, keep_blank_values=True))
    for unknown in options.keys() - set(known):
        raise UsageError(f"unknown option {unknown!r} of {owner}: choose among {', '.join(known)}")
    return name, options


def open_camera(source: str) -> cv2.VideoCapture:
    """Opens a V4L2 camera by its number or path, with ``format`` (four characters), ``width``, ``height``, ``fps``."""
    settings: Dict[str, Tuple[int, Callable[[str], float]]] = {
        # The format first: it determines the available sizes and rates.
        "format": (cv2.CAP_PROP_FOURCC, lambda code: cv2.VideoWriter_fourcc(*code)),  # type: ignore[attr-defined]
        "width": (cv2.CAP_PROP_FRAME_WIDTH, float),
        "height": (cv2.CAP_PROP_FRAME_HEIGHT, float),
        "fps": (cv2.CAP_PROP_FPS, float),
    }
    device, options = split_options(source, settings, "a camera")
    if ("width" in options) != ("height" in options):  # OpenCV waits for the other, and changes nothing
        raise UsageError("a camera's width and height go together: give both")
    node = device if device.startswith("/dev/") else f"/dev/video{device}"
    capture = cv2.VideoCapture(node, cv2.CAP_V4L2)
    if not capture.isOpened():
        raise SourceError(f"cannot open camera {device}: is it connected and free, and is {node} readable?")
    for name in filter(options.__contains__, settings):
        prop, convert = settings[name]
        try:
            capture.set(prop, convert(options[name]))
        except (TypeError, ValueError):
            raise UsageError(f"camera option {name} cannot be {options[name]!r}") from None
    return capture


def csi_pipeline(source: str) -> str:
    """The pipeline of a Jetson's CSI camera, with I420 output in ordinary memory; ``flip`` is 0..7 of ``nvvidconv``."""
    values = {"width": "1280", "height": "720", "fps": "30", "flip": "0"}
    sensor, options = split_options(source[len("csi://") :], values, "a CSI camera")
    values = {"sensor": sensor, **values, **options}
    for name, value in values.items():
        if not re.fullmatch(r"\d{1,5}", value):
            raise UsageError(f"{name} of a CSI camera must be a whole number, not {value!r}")
    return (
        "nvarguscamerasrc sensor-id={sensor} "
        "! video/x-raw(memory:NVMM),width={width},height={height},framerate={fps}/1 "
        "! nvvidconv flip-method={flip} ! video/x-raw,format=I420"
    ).format_map(values)


class Pipeline:
    """A GStreamer pipeline in a ``gst-launch-1.0`` process, read as YUV4MPEG2 through a pipe.

    It has the methods of ``cv2.VideoCapture`` that a live source calls. No call blocks for longer than its
    timeout. All pictures are read into one buffer; ``retrieve`` allocates the BGR picture, which belongs to
    the caller.
    """

    def __init__(self, pipeline: str) -> None:
        body = re.sub(r"\s*!\s*appsink\b[^!]*$", "", pipeline.strip())
        try:
            elements = shlex.split(body)
        except ValueError as error:
            raise UsageError(f"the pipeline cannot be parsed ({error}): check its quotes") from None
        # Pictures go through a pipe of their own, because a Jetson's camera element prints to standard output.
        # Errors go into a file, because a pipe that nobody reads would block the process.
        self._errors = tempfile.TemporaryFile()  # noqa: SIM115
        self._pipe, pictures = os.pipe()
        self._close = weakref.finalize(self, os.close, self._pipe)
        # Before 1.26.1, y4menc lets decoders pad planes, but then writes the padding: their question must not reach it.
        raw = "video/x-raw,format=I420 ! identity drop-allocation=true"
        tail = f"! videoconvert ! {raw} ! y4menc ! fdsink fd={pictures}".split()
        try:
            self._process = subprocess.Popen(
                ["gst-launch-1.0", "-q", *elements, *tail],
                stdin=subprocess.DEVNULL,
                stdout=subprocess.DEVNULL,
                stderr=self._errors,
                pass_fds=[pictures],
                start_new_session=True,  # Ctrl-C must not reach it: we stop it in order
            )
        except FileNotFoundError:
            raise SourceError("this source needs GStreamer: gstreamer1.0-tools, gstreamer1.0-plugins-good") from None
        finally:
            os.close(pictures)
        # If the program ends while a read hangs, nobody calls release, but the camera must be freed.
        self._kill = weakref.finalize(self, self._process.kill)
        self._poll = select.poll()
        self._poll.register(self._pipe, select.POLLIN)
        with suppress(OSError):
            fcntl.fcntl(self._pipe, 1031, 1 << 20)  # F_SETPIPE_SZ, unknown to Python before 3.10: fewer wake-ups
        try:
            found = {field[:1]: field[1:] for field in self._line(START_TIMEOUT).split()}
            width, height = int(found[b"W"]), int(found[b"H"])
            rate, per = map(int, found.get(b"F", b"0:1").split(b":"))
            if width % 2 or height % 2:
                raise SourceError(f"the pipeline gives pictures of {width}x{height}: both sides must be even")
        except (EOFError, KeyError, ValueError):
            reason = without_secrets(self._complaint())
            for secret in re.findall(r"(?:user|pass|pw|secret|token|key)[\w-]*=(\S+)", body):
                reason = reason.replace(secret.strip("\"'"), "***")
            self.release()
            raise SourceError(f"GStreamer cannot run the pipeline: {reason}") from None
        except BaseException:
            self.release()
            raise
        self._fps = rate / per if per > 0 else 0.0
        self._planes = np.zeros((height * 3 // 2, width), np.uint8)
        self._buffer = self._planes.reshape(-1)  # all bytes of a picture, padding included
        self._padding_known = width % 8 == 0  # then there is no padding
        self._header_read = False  # that of the next picture
        #: Copies (to, from) that remove the padding from a picture.
        self._copies: List[Tuple[np.ndarray, np.ndarray]] = []

    def get(self, prop: int) -> float:
        return self._fps if prop == cv2.CAP_PROP_FPS else 0.0

    def grab(self) -> bool:
        """Reads one picture; False when the pipeline has ended, was released or delivers nothing in time."""
        try:
            if self._pipe < 0 or not (self._header_read or self._line(READ_TIMEOUT).startswith(b"FRAME")):
                return False
            self._header_read = False
            self._fill(self._buffer.data, READ_TIMEOUT)
            if not self._padding_known:
                self._measure()
        except (EOFError, OSError):
            return False
        return True

    def _measure(self) -> None:
        """Finds out whether rows are padded to four bytes, as by GStreamer before 1.26.1: then no header follows."""
        self._padding_known = True
        flat, size = self._buffer, self._buffer.size
        height, width = self._planes.shape[0] * 2 // 3, self._planes.shape[1]
        following = np.zeros(6, np.uint8)
        with suppress(EOFError):  # the stream has ended: this was the whole picture
            self._fill(following.data, READ_TIMEOUT)
        self._header_read = following.tobytes() == b"FRAME\n"
        if not self._header_read and following.any():
            stride, half = width + -width % 4, width // 2 + -(width // 2) % 4
            self._buffer = np.concatenate([flat, following, np.zeros(height * (stride + half) - size - 6, np.uint8)])
            self._fill(self._buffer[size + 6 :].data, READ_TIMEOUT)
            luma, chroma = np.split(self._buffer, [height * stride])
            for plane, padded in zip(np.split(flat, [height * width]), (luma, chroma)):
                rows = padded.reshape(height, -1)
                self._copies.append((plane.reshape(height, -1), rows[:, : plane.size // height]))

    def retrieve(self) -> Tuple[bool, np.ndarray]:
        """The picture that was read last, BGR uint8 ``(H, W, 3)``."""
        for plane, padded in self._copies:
            plane[...] = padded
        return True, cv2.cvtColor(self._planes, cv2.COLOR_YUV2BGR_I420)

    def release(self) -> None:
        # A closed descriptor's number may soon be reused for another file or connection.
        self._pipe = -1
        self._kill.detach()
        self._process.terminate()
        try:
            self._process.wait(2)
        except subprocess.TimeoutExpired:
            self._process.kill()
            self._process.wait()
        self._close()  # not earlier: writing to a closed pipe would kill the process at once
        self._errors.close()

    def _fill(self, target: memoryview, timeout: float) -> None:
        filled, deadline = 0, monotonic() + timeout
        while filled < len(target):
            ready = self._poll.poll(max(0.0, 1000 * (deadline - monotonic())))
            count = os.readv(self._pipe, [target[filled:]]) if ready else 0
            if not count:
                raise EOFError
            filled += count

    def _line(self, timeout: float) -> bytes:
        line, byte, deadline = bytearray(), bytearray(1), monotonic() + timeout
        while len(line) < 256 and byte != b"\n":
            self._fill(memoryview(byte), deadline - monotonic())
            line += byte
        return bytes(line)

    def _complaint(self) -> str:
        try:
            self._process.wait(1)
        except subprocess.TimeoutExpired:
            return "it starts but gives no picture"
        self._errors.seek(0)
        lines = self._errors.read(4096).decode("utf-8", "replace").splitlines()
        return next((line for line in lines if line.strip()), "it ended without a picture")
