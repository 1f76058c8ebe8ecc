"""Trackers for the tests, importable by worker processes as ``python:fake_trackers:...``."""

from __future__ import annotations

import os

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


class Counting(Still):
    """Counts how many sequences were begun in this process."""

    begun = 0

    def init(self, frame, box):
        Counting.begun += 1
        super().init(frame, box)
