"""Sources of frames, and a reader that reads them on its own thread.

A camera does not wait: its reader keeps reading and hands over the newest frame, so that a slow
tracker sees the present and not a growing backlog. A file does wait: its reader decodes a few frames
ahead while the tracker works.
"""

from __future__ import annotations

import atexit
import threading
from abc import abstractmethod
from collections import deque
from contextlib import suppress
from time import monotonic, time
from typing import Any, Callable, ContextManager, Deque, Iterator, NamedTuple, Optional, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError

READ_AHEAD = 4  #: frames of a file or folder that are decoded ahead
STALL_AFTER = 2.0  #: seconds of silence after which a camera or stream is reported as stalled
RECONNECT_AFTER = (0.5, 10.0)  #: seconds between attempts to reconnect: at first, and at most; doubled each time


class Source(ContextManager["Source"]):
    """Frames in order, as BGR uint8 ``(H, W, 3)``; None stands for an unreadable frame.

    At the end, ``missing`` is the number of announced frames that did not arrive, and ``damaged`` says
    whether the file is truncated or damaged, or its server stopped sending.
    """

    name = ""  #: shown to users; without passwords
    fps = 0.0  #: nominal frames per second; 0 if unknown
    length: Optional[int] = None  #: number of frames that the source announces; None if unknown or endless
    live = False  #: whether frames arrive by themselves, as from a camera, rather than on request
    pts: Optional[float] = None  #: time of the latest frame on the source's own clock, in seconds, if it has one
    missing = 0
    damaged = False

    @abstractmethod
    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        """Yields the frames, once."""

    def close(self) -> None:
        """Releases the file or device."""

    def __exit__(self, *_: object) -> None:
        self.close()


class LiveSource(Source):
    """A camera or stream that can be reconnected after it was lost.

    ``connect`` opens it: it returns an object with the methods ``grab``, ``retrieve``, ``release`` and
    ``get`` of ``cv2.VideoCapture``, or raises ``SourceError``.
    """

    live = True
    ended = False  #: whether the source has an end and has reached it, so that reconnecting is useless

    def __init__(self, name: str, connect: Callable[[], Any]) -> None:
        self.name = name
        self._connect = connect
        self._capture = connect()
        self.fps = frame_rate(self._capture)

    def read(self) -> Optional[Tuple[Optional[np.ndarray], float]]:
        """Waits for the next frame; returns it and its arrival (``time.monotonic``), or None if the source is lost."""
        if not self._capture.grab():
            return None
        received = monotonic()  # before the picture is converted to BGR
        with suppress(cv2.error):  # a damaged picture
            good, image = self._capture.retrieve()
            return (image if good else None), received
        return None, received

    def reconnect(self) -> None:
        """Reopens the source; ``SourceError`` if that fails."""
        self._capture.release()
        self._capture = self._connect()

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        return (image for image, _ in iter(self.read, None))

    def close(self) -> None:
        self._capture.release()


def frame_rate(capture: Any) -> float:
    """Nominal frames per second of a capture; 0 if unknown."""
    fps = float(capture.get(cv2.CAP_PROP_FPS) or 0)
    return fps if 0 < fps <= 1000 else 0.0  # FFmpeg says 90000 if a stream does not tell


class Captured(NamedTuple):
    """A frame on its way to the tracker.

    Attributes:
        image: BGR uint8 ``(H, W, 3)``; None if this frame could not be read.
        number: its number in the source, from 0; dropped frames are counted, too.
        received: ``time.monotonic()`` at which it reached this process.
        time: the same moment in seconds since 1970. Ages are not computed from it: that clock may jump.
        pts: its time on the source's own clock, such as a video's, in seconds; None without a clock.
    """

    image: Optional[np.ndarray]
    number: int
    received: float
    time: float
    pts: Optional[float] = None

    @property
    def age(self) -> float:
        """Seconds since the frame reached this process."""
        return monotonic() - self.received


class Reader(ContextManager["Reader"], Iterator[Captured]):
    """Iterates over the ``Captured`` frames of a source, which is read on another thread.

    Frames of a file or folder are never dropped; their time is that of decoding, and their age how long
    they waited. From a live source, the newest frame is handed over, each at most once.

    Counters: of ``received`` frames, ``dropped`` were replaced by a newer one before the tracker asked;
    ``stalls`` and ``reconnects`` of a live source; ``worst_age``, the greatest age when handed over, in seconds.

    Args:
        source: the source to read, a live one already connected. The reader closes it.
        patience: seconds of silence after which a live source is given up; None for never.
        report: called with one line, on any thread, when a live source stalls, is lost or comes back.
    """

    def __init__(
        self, source: Source, patience: Optional[float] = 30.0, report: Callable[[str], None] = lambda line: None
    ) -> None:
        self.source = source
        self.received = self.dropped = self.stalls = self.reconnects = 0
        self.worst_age = 0.0
        self._patience = patience
        self._tell = lambda line: report(f"{source.name}: {line}")
        self._queue: Deque[Captured] = deque()
        self._failure = ""
        self._changed = threading.Condition()
        self._closing = False
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._read, name=f"reader of {source.name}", daemon=True)
        self._thread.start()
        # A thread that is inside OpenCV when Python exits would abort the process. Reads may take 20 seconds.
        atexit.register(self.close, 25.0)

    def __next__(self) -> Captured:
        """Waits for a frame. The source's errors are raised here; a long silence raises ``SourceError``."""
        silence = 0.0
        while True:
            began = monotonic()
            with self._changed:
                self._changed.wait_for(lambda: self._queue or self._closing, STALL_AFTER / 4)
                frame = self._queue.popleft() if self._queue else None
                closing = self._closing
                self._changed.notify_all()
            if frame is not None:
                self.worst_age = max(self.worst_age, frame.age)
                return frame
            if closing:
                error, self._error = self._error, None
                raise error or StopIteration
            if not self.source.live:
                continue
            before, silence = silence, silence + min(monotonic() - began, STALL_AFTER)  # this process may have slept
            if before <= STALL_AFTER < silence:
                self.stalls += 1
                self._tell(f"no frame for {silence:.1f} s")
            if self._patience is not None and silence > self._patience:
                raise SourceError(f"{self.source.name} has given no frame for {silence:.0f} s{self._failure}: check it")

    def close(self, wait: float = 2.0) -> None:
        """Ends the thread, waiting so many seconds, and releases the source; safe to call twice, from any thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            # If a read hangs, the daemon thread releases the source once the read returns, if ever.
            self._thread.join(wait)
        with self._changed:
            self._queue.clear()
        if not self._thread.is_alive():
            atexit.unregister(self.close)

    def __exit__(self, *_: object) -> None:
        self.close()

    def _read(self) -> None:
        """Runs on the thread."""
        try:
            if isinstance(self.source, LiveSource) and self.source.live:
                self._read_newest(self.source)
            else:
                for image in self.source:
                    if not self._put(image, monotonic()):
                        break
        except BaseException as error:  # handed to whoever waits for a frame
            self._error = error
        finally:
            self.source.close()
            with self._changed:
                self._closing = True
                self._changed.notify_all()

    def _put(self, image: Optional[np.ndarray], received: float) -> bool:
        """Queues a frame; a live one replaces one that still waits. Returns False once the reader is closed."""
        with self._changed:
            if self.source.live:
                self.dropped += len(self._queue)
                self._queue.clear()
            self._changed.wait_for(lambda: self._closing or len(self._queue) < READ_AHEAD)
            if self._closing:
                return False
            unix = time() - (monotonic() - received)
            self._queue.append(Captured(image, self.received, received, unix, self.source.pts))
            self.received += 1
            self._changed.notify_all()
        return True

    def _read_newest(self, source: LiveSource) -> None:
        gone: Optional[float] = None  # when the source was lost
        delay = RECONNECT_AFTER[0]
        while not self._closing:
            read = source.read()
            if read is not None:
                if gone is not None:
                    self.reconnects += 1
                    self._tell(f"back after {read[1] - gone:.1f} s")
                    gone, delay = None, RECONNECT_AFTER[0]
                self._put(*read)
                continue
            if source.ended:
                self._tell("gave the same frames twice: a recording, which ends here")
                break
            if gone is None and not self._closing:
                gone = monotonic()
                self._tell("went away; reconnecting")
            with self._changed:
                if self._changed.wait_for(lambda: self._closing, delay):
                    break
            delay, self._failure = min(2 * delay, RECONNECT_AFTER[1]), ""
            try:
                source.reconnect()
            except (SourceError, OSError) as error:  # OSError: too little memory or too few descriptors, which may pass
                self._failure = f" ({error})"
