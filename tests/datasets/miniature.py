"""Writes the files of miniature data sets: images, texts and boxes."""

from __future__ import annotations

import cv2
import numpy as np


def write_images(folder, images, pattern="{}.png", first=0):
    """Writes numbered images into a folder, which is created if needed."""
    folder.mkdir(parents=True, exist_ok=True)
    for number, image in enumerate(images, start=first):
        assert cv2.imwrite(str(folder / pattern.format(number)), image)


def write_frames(folder, count, pattern="{:08d}.jpg", first=1, value=90):
    """Writes ``count`` frames of 32 x 24 pixels."""
    write_images(folder, [np.full((24, 32, 3), value, np.uint8)] * count, pattern, first)


def save(path, content):
    """Writes bytes, a text, or boxes, one per row; creates the folder if needed."""
    path.parent.mkdir(parents=True, exist_ok=True)
    text = content if isinstance(content, (str, bytes)) else rows(content)
    path.write_bytes(text.encode() if isinstance(text, str) else text)


def write_tree(root, files):
    """Writes ``files``: path -> content for ``save``, or file name pattern -> number of frames; returns ``root``."""
    for place, content in files.items():
        if isinstance(content, int):
            write_frames((root / place).parent, content, (root / place).name, first=int(place.endswith("d}.jpg")))
        else:
            save(root / place, content)
    return root


def rows(boxes, separator=","):
    return "".join(separator.join(str(v) for v in box) + "\n" for box in boxes)


def drift(count, x=4, step=1):
    return [(x + step * i, 5, 10, 8) for i in range(count)]
