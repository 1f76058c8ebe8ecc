"""Reading frames on a thread of their own.

A camera does not wait: its reader keeps taking frames and hands over the newest, so that a slow
tracker sees the present and not a growing backlog. A file does wait: its reader
decodes a few frames ahead while the tracker works.
"""

from __future__ import annotations

import threading
from collections import deque
from dataclasses import dataclass
from time import monotonic, time
from typing import Callable, Deque, Iterator, List, NamedTuple, Optional

import numpy as np

from asymtrack_edge.errors import SourceError
from asymtrack_edge.runtime.sources.base import LiveSource, Source


class Captured(NamedTuple):
    """A frame on its way to the tracker.

    Attributes:
        image: BGR uint8 ``(H, W, 3)``; None if this frame could not be read.
        number: its number in the source from 0; frames dropped on the way are counted too.
        received: ``time.monotonic()`` at which it reached this process.
        time: the same moment in seconds since 1970, by the system's clock when the frame was handed
            over. Ages are never computed from it: that clock may jump.
        pts: its time on the source's own clock in seconds, such as that of a video; None without one.
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


@dataclass
class CaptureStats:
    """What happened to the frames of a source so far.

    Attributes:
        received: frames that reached this process.
        delivered: those handed to the tracker.
        dropped: those replaced by a newer one before the tracker asked.
        unreadable: those without a picture.
        stalls: times the source fell silent for ``LivePolicy.stall_after``.
        reconnects: times it was opened again with success.
        age: seconds between a frame's arrival and its handing over, of the last one delivered.
        worst_age: the largest of these.
    """

    received: int = 0
    delivered: int = 0
    dropped: int = 0
    unreadable: int = 0
    stalls: int = 0
    reconnects: int = 0
    age: float = 0.0
    worst_age: float = 0.0


@dataclass(frozen=True)
class LivePolicy:
    """How patient to be with a camera or stream.

    Attributes:
        stall_after: seconds of silence after which the source is reported as stalled.
        patience: seconds of silence after which it is given up; None for never.
        first_delay, longest_delay: seconds between attempts to reconnect, doubled each time.
    """

    stall_after: float = 2.0
    patience: Optional[float] = 30.0
    first_delay: float = 0.5
    longest_delay: float = 10.0


class Reader:
    """Iterates over the ``Captured`` frames of a source that is read on a thread.

    A file or folder is read up to ``depth`` frames ahead; nothing is dropped, a frame's time is that of
    its decoding, and its age says how long it waited. Of a live source the newest frame is handed over,
    each at most once.

    Args:
        source: the source to read, a live one already connected. The reader closes it.
        policy: when a live source counts as stalled, and as gone.
        report: called with one line when a live source stalls, goes away or comes back, on the thread that
            iterates.
        depth: how many frames of a file or folder are decoded ahead.

    Attributes:
        stats: counts so far.
    """

    def __init__(
        self,
        source: Source,
        policy: Optional[LivePolicy] = None,
        report: Optional[Callable[[str], None]] = None,
        depth: int = 4,
    ) -> None:
        self.source = source
        self.policy = policy or LivePolicy()
        self.stats = CaptureStats()
        self._report = report or (lambda line: None)
        self._depth = depth
        self._queue: Deque[Captured] = deque()
        self._news: List[str] = []
        self._heard = monotonic()
        self._failure = ""
        self._changed = threading.Condition()
        self._closing = False
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._read, name=f"reader of {source.name}", daemon=True)
        self._thread.start()

    def __iter__(self) -> Iterator[Captured]:
        return self

    def __next__(self) -> Captured:
        """Waits for a frame; any error of the source is raised here.

        Raises:
            StopIteration: the source has ended or the reader was closed.
            SourceError: a live source has been silent for too long.
        """
        policy, stalled = self.policy, False
        while True:
            with self._changed:
                if not (self._queue or self._closing or self._news):
                    self._changed.wait(policy.stall_after / 4)
                frame = self._queue.popleft() if self._queue else None
                news, self._news = self._news, []
                silence = monotonic() - self._heard
                closing = self._closing
                self._changed.notify_all()
            for line in news:
                self._report(f"{self.source.name}: {line}")
            if frame is not None:
                return self._deliver(frame)
            if closing:
                error, self._error = self._error, None
                raise error or StopIteration
            if not self.source.live:
                continue
            if silence > policy.stall_after and not stalled:
                stalled = True
                self.stats.stalls += 1
                self._report(f"{self.source.name}: no frame for {silence:.1f} s")
            if policy.patience is not None and silence > policy.patience:
                why = f" ({self._failure})" if self._failure else ""
                raise SourceError(f"{self.source.name} has given no frame for {silence:.0f} s{why}: check it")

    def close(self) -> None:
        """Ends the thread and releases the source; safe to call twice, and from any thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            # A driver may hang in a read: then the thread, a daemon, releases the source if it ever returns.
            self._thread.join(2)
        with self._changed:
            self._queue.clear()

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _deliver(self, frame: Captured) -> Captured:
        stats, age = self.stats, frame.age
        stats.delivered += 1
        stats.unreadable += frame.image is None
        stats.age = age
        stats.worst_age = max(stats.worst_age, age)
        return frame._replace(time=time() - age)

    def _read(self) -> None:
        """Runs on the thread."""
        try:
            if isinstance(self.source, LiveSource):
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
        """Hands a frame over; a live one in place of one that still waits. False once the reader is closed."""
        with self._changed:
            if self.source.live:
                self.stats.dropped += len(self._queue)
                self._queue.clear()
            self._changed.wait_for(lambda: self._closing or len(self._queue) < self._depth)
            if self._closing:
                return False
            self._queue.append(Captured(image, self.stats.received, received, 0.0, self.source.pts))
            self._heard = received
            self.stats.received += 1
            self._changed.notify_all()
        return True

    def _read_newest(self, source: LiveSource) -> None:
        gone: Optional[float] = None  # since when
        delay = self.policy.first_delay
        while not self._closing:
            read = source.read()
            if read is None:
                if source.ended:
                    self._tell("gave the same frames twice: a recording, which ends here")
                    return
                if gone is None:
                    gone, delay = monotonic(), self.policy.first_delay
                    self._tell("went away; reconnecting")
                self._reconnect(source, delay)
                delay = min(2 * delay, self.policy.longest_delay)
                continue
            if gone is not None:
                self.stats.reconnects += 1
                self._tell(f"back after {read[1] - gone:.1f} s")
                gone = None
            self._put(*read)

    def _reconnect(self, source: LiveSource, delay: float) -> None:
        """Waits, then tries once to open the source again."""
        with self._changed:
            if self._changed.wait_for(lambda: self._closing, delay):
                return
        try:
            source.reconnect()
            self._failure = ""
        except SourceError as error:
            self._failure = str(error)

    def _tell(self, line: str) -> None:
        with self._changed:
            self._news.append(line)
            self._changed.notify_all()


def open_reader(
    source: Source, policy: Optional[LivePolicy] = None, report: Optional[Callable[[str], None]] = None
) -> Reader:
    """Starts to read a source; see ``Reader``.

    Example::

        with open_reader(open_source("rtsp://camera/stream")) as frames:
            for frame in frames:
                track = tracker.update(frame.image)
    """
    return Reader(source, policy, report)
