"""Frames and boxes of miniature data sets."""

from __future__ import annotations

from pathlib import Path

import cv2
import numpy as np


def write_frames(folder: Path, count: int, pattern: str = "{:08d}.jpg", first: int = 1, value: int = 90) -> None:
    """Writes ``count`` frames of 32 x 24 pixels."""
    folder.mkdir(parents=True, exist_ok=True)
    for number in range(first, first + count):
        assert cv2.imwrite(str(folder / pattern.format(number)), np.full((24, 32, 3), value, np.uint8))


def rows(boxes, separator: str = ",") -> str:
    """Boxes as a text file."""
    return "".join(separator.join(str(v) for v in box) + "\n" for box in boxes)


def drift(count: int, x: float = 4, step: float = 1):
    """A 10 x 8 box that moves to the right."""
    return [(x + step * i, 5, 10, 8) for i in range(count)]
