"""Frames to track on: a synthetic 1280x720 clip, the user's video, or a data set's sequences."""

from __future__ import annotations

from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Callable, Iterable, Iterator, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.geometry import Box, check_box
from asymtrack_edge.runtime.sources import Source, open_source
from asymtrack_edge.runtime.sources.clip import first_frames, synthetic_clip

#: OpenCV Zoo and most cameras: 1280x720.
HD = (1280, 720)


@dataclass(frozen=True)
class Clip:
    """Decoded frames, and the same as an encoded video.

    Attributes:
        name: for people.
        frames: BGR uint8.
        box: target in the first frame.
        open: opens the encoded video from its beginning.
    """

    name: str
    frames: List[np.ndarray]
    box: Box
    open: Callable[[], Source]


def synthetic(folder: Path, frames: int = 36) -> Clip:
    """The 720p clip, encoded into ``folder``.

    Raises:
        SourceError: this OpenCV can encode no video.
    """
    pairs = list(synthetic_clip(frames, HD))
    for name, code in (("clip.mp4", "mp4v"), ("clip.avi", "MJPG")):
        path = folder / name
        writer = cv2.VideoWriter(str(path), _four_characters(code), 30.0, HD)
        if writer.isOpened():
            for i in _there_and_back(len(pairs)):
                writer.write(pairs[i][0])
            writer.release()
            title = f"synthetic {HD[0]}x{HD[1]}, {frames} frames, {code}"
            return Clip(title, [f for f, _ in pairs], pairs[0][1], partial(open_source, str(path)))
        writer.release()
    raise SourceError("this OpenCV can encode neither mp4v nor MJPG: give --video FILE and --box")


def _four_characters(code: str) -> int:
    return sum(ord(c) << 8 * i for i, c in enumerate(code))


def _there_and_back(count: int) -> List[int]:
    """A clip forwards and backwards, without a cut."""
    return [*range(count), *range(count - 2, -1, -1)]


def from_source(source: str, box: Sequence[float], frames: int = 36) -> Clip:
    """The first frames of a video or folder of images.

    Raises:
        SourceError: it cannot be opened, or has fewer than two readable frames.
        BoxError: the box cannot be a target in its first frame.
    """
    with open_source(source) as opened:
        if opened.live:
            raise UsageError("a camera is no --video: its frames cannot be repeated")
        read = first_frames(opened, frames)
    height, width = read[0].shape[:2]
    title = f"{Path(source).name}, {width}x{height}, first {len(read)} frames"
    return Clip(title, read, check_box(box, read[0].shape), lambda: open_source(source))


def sequences(dataset: Optional[str]) -> Tuple[str, Iterator[Tuple[Iterable[np.ndarray], Box]]]:
    """What P7 runs on: name and sequences.

    Args:
        dataset: ``NAME=FOLDER`` with a name that ``asymtrack-eval`` knows; None for synthetic clips.

    Raises:
        UsageError: not of that form, or an unknown data set.
        DatasetError: the folder is not laid out as published.
    """
    if dataset is None:
        return "3 synthetic clips of 36 frames, 640x480", _synthetic_sequences()
    name, _, root = dataset.partition("=")
    if not name or not root:
        raise UsageError(f"--dataset takes NAME=FOLDER, for example otb=/data/OTB100, not {dataset!r}")
    from asymtrack_edge.datasets import open_dataset

    found = open_dataset(name, Path(root))
    clips = (((s.read(i) for i in range(len(s))), Box(*s.start)) for s in found.sequences())
    return f"{name}, {len(found)} sequences", clips


def _synthetic_sequences() -> Iterator[Tuple[Iterable[np.ndarray], Box]]:
    for seed in range(3):
        pairs = list(synthetic_clip(36, (640, 480), seed))
        yield [f for f, _ in pairs], pairs[0][1]
