"""All boxes of a run, for the download button of the web view."""

from __future__ import annotations

import os
import tempfile
import threading
from typing import IO, Iterator, Tuple

from asymtrack_edge.runtime.outputs.rows import csv_header

#: Bytes after which a new file is begun and the one before the last is forgotten: a run that never ends
#: must not fill the disk, or the memory, where temporary files lie there. A row has about 54.
MOST_BYTES = 32 << 20
_CHUNK = 1 << 16


def _new_file() -> IO[bytes]:
    return tempfile.TemporaryFile(buffering=0)


class BoxLog:
    """Keeps the newest rows, between ``most`` and twice as many bytes of a long run.

    One thread appends; any may read.

    Args:
        most: see above.
    """

    def __init__(self, most: int = MOST_BYTES) -> None:
        self._most = most
        self._lock = threading.Lock()
        self._files: Tuple[IO[bytes], ...] = (_new_file(),)
        self._size = 0

    def append(self, rows: bytes) -> None:
        """Adds whole rows.

        Raises:
            OSError: there is no room for them.
        """
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
