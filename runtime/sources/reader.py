"""Reading frames on a thread of their own.

A camera does not wait: its reader keeps taking frames and hands over the newest, so that a slow
tracker decides on what is happening now and not on a growing backlog. A file does wait: its reader
decodes a few frames ahead while the tracker works.
"""

from __future__ import annotations

import threading
from abc import ABC, abstractmethod
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


class Reader(ABC):
    """Iterates over the ``Captured`` frames of a source that is read on a thread.

    Attributes:
        source: what is read; the reader closes it.
        stats: counts so far.
    """

    def __init__(self, source: Source) -> None:
        self.source = source
        self.stats = CaptureStats()
        self._changed = threading.Condition()
        self._closing = False
        self._error: Optional[BaseException] = None
        self._thread = threading.Thread(target=self._guarded, name=f"reader of {source.name}", daemon=True)

    def __iter__(self) -> Iterator[Captured]:
        return self

    @abstractmethod
    def __next__(self) -> Captured:
        """Waits for a frame.

        Raises:
            StopIteration: the source has ended or the reader was closed.
            SourceError: a live source has been silent for too long.
        """

    def close(self) -> None:
        """Ends the thread and releases the source; safe to call twice, and from any thread."""
        with self._changed:
            self._closing = True
            self._changed.notify_all()
        if self._thread is not threading.current_thread():
            # A driver may hang in a read: then the thread, a daemon, releases the source if it ever returns.
            self._thread.join(2)

    def __enter__(self) -> Reader:
        return self

    def __exit__(self, *_: object) -> None:
        self.close()

    def _guarded(self) -> None:
        try:
            self._read()
        except BaseException as error:  # handed to whoever waits for a frame
            self._error = error
        finally:
            self.source.close()
            with self._changed:
                self._closing = True
                self._changed.notify_all()

    @abstractmethod
    def _read(self) -> None:
        """Reads until the source ends or ``_closing`` is set; runs on the thread."""

    def _deliver(self, frame: Captured) -> Captured:
        stats, age = self.stats, frame.age
        stats.delivered += 1
        stats.unreadable += frame.image is None
        stats.age = age
        stats.worst_age = max(stats.worst_age, age)
        return frame._replace(time=time() - age)

    def _finish(self) -> Captured:
        if self._error is not None:
            error, self._error = self._error, None
            raise error
        raise StopIteration


class ReadAhead(Reader):
    """Reads a file or folder up to ``depth`` frames ahead of the tracker; drops nothing.

    A frame's time is that of its decoding; its age says how long it waited in the queue.
    """

    def __init__(self, source: Source, depth: int = 4) -> None:
        super().__init__(source)
        self._depth = depth
        self._queue: Deque[Captured] = deque()
        self._thread.start()

    def __next__(self) -> Captured:
        """Waits for the next frame; any error of the source is raised here."""
        with self._changed:
            while not self._queue:
                if self._closing:
                    return self._finish()
                self._changed.wait()
            waiting = self._queue.popleft()
            self._changed.notify_all()
        return self._deliver(waiting)

    def close(self) -> None:
        """Ends the thread, releases the source and drops what was read ahead."""
        super().close()
        with self._changed:
            self._queue.clear()

    def _read(self) -> None:
        for number, image in enumerate(self.source):
            frame = Captured(image, number, monotonic(), 0.0, self.source.pts)
            with self._changed:
                while len(self._queue) >= self._depth and not self._closing:
                    self._changed.wait()
                if self._closing:
                    return
                self._queue.append(frame)
                self.stats.received += 1
                self._changed.notify_all()


class LiveReader(Reader):
    """Keeps reading a camera or stream and hands over the newest frame, each at most once.

    Args:
        source: a camera or stream, already connected.
        policy: when it counts as stalled, and as gone.
        report: called with a line for people when the source stalls, goes away or comes back; on
            the thread of whoever iterates.
    """

    def __init__(
        self,
        source: LiveSource,
        policy: Optional[LivePolicy] = None,
        report: Optional[Callable[[str], None]] = None,
    ) -> None:
        super().__init__(source)
        self._live = source
        self.policy = policy or LivePolicy()
        self._report = report or (lambda line: None)
        self._news: List[str] = []
        self._newest: Optional[Captured] = None
        self._heard = monotonic()
        self._failure = ""
        self._thread.start()

    def __next__(self) -> Captured:
        """Waits for a frame newer than the last, and reports meanwhile what the source does."""
        policy, stalled = self.policy, False
        while True:
            with self._changed:
                if self._newest is None and not self._closing and not self._news:
                    self._changed.wait(policy.stall_after / 4)
                newest, self._newest = self._newest, None
                news, self._news = self._news, []
                silence = monotonic() - self._heard
                closing = self._closing
            for line in news:
                self._report(f"{self.source.name}: {line}")
            if newest is not None:
                return self._deliver(newest)
            if closing:
                return self._finish()
            if silence > policy.stall_after and not stalled:
                stalled = True
                self.stats.stalls += 1
                self._report(f"{self.source.name}: no frame for {silence:.1f} s")
            if policy.patience is not None and silence > policy.patience:
                why = f" ({self._failure})" if self._failure else ""
                raise SourceError(f"{self.source.name} has given no frame for {silence:.0f} s{why}: check it")

    def _read(self) -> None:
        gone: Optional[float] = None  # since when
        delay = self.policy.first_delay
        while not self._closing:
            read = self._live.read()
            if read is None:
                if self._live.ended:
                    self._tell("gave the same frames twice: a recording, which ends here")
                    return
                if gone is None:
                    gone, delay = monotonic(), self.policy.first_delay
                    self._tell("went away; reconnecting")
                self._reconnect(delay)
                delay = min(2 * delay, self.policy.longest_delay)
                continue
            image, received = read
            if gone is not None:
                self.stats.reconnects += 1
                self._tell(f"back after {received - gone:.1f} s")
                gone = None
            with self._changed:
                if self._newest is not None:
                    self.stats.dropped += 1
                self._newest = Captured(image, self.stats.received, received, 0.0)
                self._heard = received
                self.stats.received += 1
                self._changed.notify_all()

    def _reconnect(self, delay: float) -> None:
        """Waits, then tries once to open the source again."""
        with self._changed:
            if self._changed.wait_for(lambda: self._closing, delay):
                return
        try:
            self._live.reconnect()
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
    """The reader that fits a source: ``LiveReader`` for what is live, else ``ReadAhead``.

    Example::

        with open_reader(open_source("rtsp://camera/stream")) as frames:
            for frame in frames:
                track = tracker.update(frame.image)
    """
    if isinstance(source, LiveSource):
        return LiveReader(source, policy, report)
    return ReadAhead(source)
