"""What a run did so far, for the page: all boxes, and how fast it goes."""

from __future__ import annotations

import os
import tempfile
import threading
from time import monotonic
from typing import IO, Any, Dict, Iterator, Tuple

from asymtrack_edge.runtime.outputs.base import Result
from asymtrack_edge.runtime.outputs.rows import csv_header
from asymtrack_edge.runtime.run import Run

#: Bytes after which a new file is begun and the one before the last is forgotten: a run that never ends
#: must not fill the disk, or the memory, where temporary files lie there. A row has about 54.
MOST_BYTES = 32 << 20
_CHUNK = 1 << 16


def _new_file() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


class BoxLog:
    """Keeps the newest rows, between ``most`` and twice as many bytes of a long run.

    One thread appends; any may read.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._files: Tuple[IO[bytes], ...] = (_new_file(),)
        self._size = 0

    def append(self, rows: bytes) -> None:
        """Adds whole rows; OSError if there is no room for them."""
        with self._lock:
            if self._size >= self._most:
                *older, last = self._files
                self._files = (last, _new_file())
                self._size = 0
                for file in older:
                    file.close()
            self._size += self._files[-1].write(rows) or 0

    def chunks(self) -> Iterator[bytes]:
        """The rows so far as csv, a piece at a time; what comes later is not among them."""
        with self._lock:
            # Descriptors of our own: the files may be forgotten while somebody reads them slowly.
            parts = [(os.dup(file.fileno()), os.fstat(file.fileno()).st_size) for file in self._files]
        try:
            yield csv_header(several=True).encode()
            for descriptor, size in parts:
                for at in range(0, size, _CHUNK):
                    yield os.pread(descriptor, min(_CHUNK, size - at), at)
        finally:
            for descriptor, _ in parts:
                os.close(descriptor)

    def close(self) -> None:
        """Forgets everything."""
        with self._lock:
            for file in self._files:
                file.close()


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
