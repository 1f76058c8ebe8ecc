"""Fake trackers that worker processes can import."""

from __future__ import annotations

import os
import time
from pathlib import Path


class Still:
    """Returns the start box, shifted right by one pixel per frame; calls ``fail`` on black frames."""

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
    """Raises an exception."""

    def fail(self):
        raise ZeroDivisionError("nothing to see")


class DiesOnBlack(Still):
    """Ends its process, like a crash in native code; only once if DIES_ONCE names a file, which records the death."""

    def fail(self):
        memory = Path(os.environ.get("DIES_ONCE", os.devnull))
        if memory.name == "null" or not memory.exists():
            memory.touch()
            os._exit(7)


class NeverReturns(Still):
    """Loops forever."""

    def fail(self):
        while True:
            time.sleep(60)
