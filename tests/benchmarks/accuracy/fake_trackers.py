"""Trackers for the tests, importable by worker processes."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Still:
    """Answers with the start box, shifted by one pixel to the right per frame; ``fail`` is called on black frames."""

    def init(self, frame, box):
        self.box = tuple(box)

    def update(self, frame):
        if not frame.any():
            self.fail()
        x, y, w, h = self.box
        self.box = (x + 1, y, w, h)
        return self.box

    def fail(self):
        pass


class FailsOnBlack(Still):
    """Raises."""

    def fail(self):
        raise ZeroDivisionError("nothing to see")


class DiesOnBlack(Still):
    """Ends its process, as a crash in native code would; once, where DIES_ONCE names a file that remembers."""

    def fail(self):
        memory = Path(os.environ.get("DIES_ONCE", os.devnull))
        if memory.name == "null" or not memory.exists():
            memory.touch()
            os._exit(7)


class NeverReturns(Still):
    """Goes on for ever."""

    def fail(self):
        while True:
            time.sleep(60)
