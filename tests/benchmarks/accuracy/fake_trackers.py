"""Trackers for the tests, importable by worker processes as ``python:fake_trackers:...``."""

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
    """Ends its process, as a crash in native code would."""

    def fail(self):
        os._exit(7)


class DiesOnce(Still):
    """Ends its process the first time; the file named by DIES_ONCE remembers."""

    def fail(self):
        if not Path(os.environ["DIES_ONCE"]).exists():
            Path(os.environ["DIES_ONCE"]).touch()
            os._exit(7)


class NeverReturns(Still):
    """Goes on for ever."""

    def fail(self):
        while True:
            time.sleep(60)
