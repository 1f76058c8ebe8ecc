"""Frames and boxes of miniature data sets."""

from __future__ import annotations

import cv2
import numpy as np


def write_frames(folder, count, pattern="{:08d}.jpg", first=1, value=90):
    """Writes ``count`` frames of 32 x 24 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        assert cv2.imwrite(str(folder / pattern.format(number)), np.full((24, 32, 3), value, np.uint8))


def save(path, text):
    """Writes a text, or boxes a row each, into a folder that is made where it is not there."""
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(text if isinstance(text, str) else rows(text))


def rows(boxes, separator=","):
    return "".join(separator.join(str(v) for v in box) + "\n" for box in boxes)


def drift(count, x=4, step=1):
    return [(x + step * i, 5, 10, 8) for i in range(count)]
