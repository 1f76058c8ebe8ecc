"""Helpers for the tests of the runtime: stand-ins for cameras and networks, frames, a check of several targets."""

from __future__ import annotations

from math import inf
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from asymtrack_edge.geometry import Box, CropWindow
from asymtrack_edge.manifest import UINT8_BGR, Manifest, TensorSpec
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.backends.base import Backend


class FakeCapture:
    """The part of ``cv2.VideoCapture`` that a live source uses, at ``rate`` frames per second; 0 for no limit.

    After ``dies_after`` frames ``grab`` fails; after ``hangs_after`` frames it blocks for ``hang`` seconds.
    """

    count, released = 0, False

    def __init__(
        self, rate: float = 0, dies_after: float = inf, hangs_after: float = inf, hang: float = 1, size: Any = (64, 48)
    ) -> None:
        self.rate, self.dies_after, self.hangs_after, self.hang = rate, dies_after, hangs_after, hang
        self.frame, self.began = np.zeros((size[1], size[0], 3), np.uint8), monotonic()

    def get(self, prop: int) -> float:
        return self.rate

    def grab(self) -> bool:
        if self.count >= self.dies_after:
            return False
        if self.count >= self.hangs_after:
            sleep(self.hang)
            return False
        self.count += 1
        if self.rate:
            sleep(max(0.0, self.began + self.count / self.rate - monotonic()))
        return True

    def retrieve(self) -> Tuple[bool, np.ndarray]:
        self.frame[0, 0, 0] = self.count % 256
        return True, self.frame.copy()

    def release(self) -> None:
        self.released = True


class ColourBackend(Backend):
    """Follows patches of one colour: a stand-in for the networks that does find its targets.

    Every search takes an extra ``pause`` seconds.
    """

    def __init__(self, pause: float = 0.0) -> None:
        image = TensorSpec("image", "uint8", (128, 128, 3))
        state, output = (TensorSpec("colour", "float32", (3,)),), TensorSpec("prediction", "float32", (5,))
        shapes, zeros, ones = (image, image, state, output), (0.0,) * 3, (1.0,) * 3
        super().__init__(Manifest("T", "fp32", "onnx", 17, 4, UINT8_BGR, *shapes, 2.0, 4.0, zeros, ones, {}), "colours")
        self.colours: List[Optional[np.ndarray]] = []
        self.calls: List[int] = []  # number of windows of each call of ``search``
        self.pause = pause

    def reserve(self, slots: int) -> None:
        self.colours += [None] * (slots - len(self.colours))
        self.capacity = len(self.colours)

    def template(self, frame: np.ndarray, window: CropWindow, slot: int = 0) -> None:
        x, y = (int(v) for v in window.centre)
        self.colours[slot] = frame[y, x].astype(int)

    def search(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> np.ndarray:
        sleep(self.pause)
        self.calls.append(len(windows))
        answers = np.full((len(windows), 5), (0.5, 0.5, 0.25, 0.25, 0.05), np.float32)
        for i, (left, top, side, centre) in enumerate(windows):
            colour = self.colours[i]
            assert colour is not None, "a slot without a template was searched"
            x0, y0 = max(0, left), max(0, top)
            patch = frame[y0 : max(y0, top + side), x0 : max(x0, left + side)]
            if not patch.size:
                continue
            mask = cv2.inRange(patch, tuple(colour - 70.0), tuple(colour + 70.0))
            if cv2.countNonZero(mask) > 20:
                x, y, w, h = cv2.boundingRect(mask)
                origin_x, origin_y = centre[0] - side / 2, centre[1] - side / 2
                middle = (x0 + x + w / 2 - origin_x) / side, (y0 + y + h / 2 - origin_y) / side
                answers[i] = (*middle, w / side, h / side, 0.95)
        return answers

    def move(self, source: int, to: int) -> None:
        self.colours[to] = self.colours[source]


PATCHES = ((0, 0, 255), (0, 255, 0), (255, 0, 0), (0, 255, 255), (255, 0, 255), (255, 255, 0), (255,) * 3)


def coloured_patches(frames: int, count: int = 3) -> Iterator[Tuple[np.ndarray, List[Box]]]:
    """Yields frames with ``count`` moving patches of different colours, and their boxes."""
    width, height, side = 320, 240, 24
    for i in range(frames):
        frame = np.full((height, width, 3), 60, np.uint8)
        boxes = []
        for k in range(count):
            x = int((width - side) * (0.5 + 0.45 * np.sin(i / 20 + k)))
            y = int((height - side) * (k + 0.5) / count)
            frame[y : y + side, x : x + side] = PATCHES[k]
            boxes.append(Box(x, y, side, side))
        yield frame, boxes


def write_video(path: Path, frames: int = 40, count: int = 3) -> None:
    """Writes a video of coloured patches, in Motion-JPEG or as .mp4."""
    codec = "mp4v" if path.suffix == ".mp4" else "MJPG"
    writer = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*codec), 25, (320, 240))
    for frame, _ in coloured_patches(frames, count):
        writer.write(frame)
    writer.release()


def count_frames(path: Path) -> int:
    capture = cv2.VideoCapture(str(path))
    return sum(1 for _ in iter(lambda: capture.read()[0], False))


def as_argument(box: Box) -> str:
    return ",".join(str(v) for v in box)


def check_several(
    many: MultiTracker, single: Tracker, frames: Sequence[np.ndarray], boxes: Sequence[Any], pixels: float, score: float
) -> None:
    """Targets that come and go get the same tracks as from single trackers, within ``pixels`` and ``score``."""
    alone = {}
    for box in boxes:
        single.init(frames[0], box)
        alone[many.add(frames[0], box)] = [single.update(frame) for frame in frames[1:]]
    for i, frame in enumerate(frames[1:]):
        if i in (2, 4):
            gone = list(alone)[i // 4]
            many.remove(gone)
            del alone[gone]
        tracks = many.update(frame)
        assert list(tracks) == list(alone)
        for target, expected in alone.items():
            np.testing.assert_allclose(tracks[target].box, expected[i].box, atol=pixels)
            np.testing.assert_allclose(tracks[target].score, expected[i].score, atol=score)
