"""Trackers for the tests, importable by worker processes as ``python:fake_trackers:...``."""

from __future__ import annotations

import os
import time
from pathlib import Path

import numpy as np


class Still:
    """Answers with the start box, shifted by one pixel to the right per frame."""

    def init(self, frame, box):
        assert frame.dtype == np.uint8 and frame.ndim == 3
        self.box = tuple(box)

    def update(self, frame):
        x, y, w, h = self.box
        self.box = (x + 1, y, w, h)
        return self.box


class FailsOnBlack(Still):
    """Raises where a frame is black."""

    def update(self, frame):
        if not frame.any():
            raise ZeroDivisionError("nothing to see")
        return super().update(frame)


class DiesOnBlack(Still):
    """Ends its process where a frame is black, as a crash in native code would."""

    def update(self, frame):
        if not frame.any():
            os._exit(7)
        return super().update(frame)


class DiesOnce(Still):
    """Ends its process where a frame is black, the first time; the file named by DIES_ONCE remembers."""

    def update(self, frame):
        if not frame.any() and not Path(os.environ["DIES_ONCE"]).exists():
            Path(os.environ["DIES_ONCE"]).touch()
            os._exit(7)
        return super().update(frame)


class NeverReturns(Still):
    """Does not return where a frame is black."""

    def update(self, frame):
        while not frame.any():
            time.sleep(60)
        return super().update(frame)
