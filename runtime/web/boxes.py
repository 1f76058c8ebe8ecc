"""What a run did so far, for the page: all boxes, and how fast it goes."""

from __future__ import annotations

import threading
from collections import deque
from time import monotonic
from typing import Any, Deque, Dict, Iterator

from asymtrack_edge.runtime.outputs.base import Result
from asymtrack_edge.runtime.outputs.rows import csv_header
from asymtrack_edge.runtime.run import Run

#: Bytes of rows that are kept: a run that never ends must not fill the memory. A row has about 54.
MOST_BYTES = 32 << 20


class BoxLog:
    """Keeps the newest rows of a run, about ``most`` bytes. One thread appends; any may read."""

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._lock = threading.Lock()
        self._blocks: Deque[bytes] = deque(maxlen=64)
        self._block_size = most // 64
        self._latest = bytearray()

    def append(self, rows: bytes) -> None:
        """Adds whole rows."""
        with self._lock:
            self._latest += rows
            if len(self._latest) >= self._block_size:
                self._blocks.append(bytes(self._latest))
                self._latest.clear()

    def chunks(self) -> Iterator[bytes]:
        """The rows so far as csv, a piece at a time; what comes later is not among them."""
        with self._lock:
            parts = [*self._blocks, bytes(self._latest)]
        return iter([csv_header(several=True).encode(), *parts])


class Rates:
    """Frames per second and milliseconds by stage; ``shown`` holds those of the last full second."""

    def __init__(self, run: Run) -> None:
        self._run = run
        self._since = self._last = monotonic()
        self._frames = 0
        self._latency = 0.0
        self._seconds: Dict[str, float] = {}
        self.shown: Dict[str, Any] = {"fps": 0.0, "stages": {}, "dropped": 0}

    def count(self, result: Result) -> None:
        """Counts a frame."""
        self._frames += 1
        self._latency += result.latency
        now, seconds = monotonic(), self._run.tracker.seconds
        paused, self._last = now - self._last > 1, now
        if not paused and now - self._since < 1:
            return
        if not paused:
            spent = {name: value - self._seconds.get(name, 0.0) for name, value in seconds.items()}
            spent["frame to decision"] = self._latency
            self.shown = {
                "fps": round(self._frames / (now - self._since), 1),
                "stages": {name: round(1000 * value / self._frames, 2) for name, value in spent.items()},
                "dropped": self._run.reader.stats.dropped,
            }
        self._since, self._frames, self._latency, self._seconds = now, 0, 0.0, seconds
