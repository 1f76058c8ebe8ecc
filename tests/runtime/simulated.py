"""Stand-ins for cameras, and frames with a moving target, made without torch."""

from __future__ import annotations

from time import monotonic, sleep
from typing import Any, Iterator, List, Optional, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError
from asymtrack_edge.geometry import Box


def moving_square(
    frames: int, size: Tuple[int, int] = (160, 120), seed: int = 0
) -> Iterator[Tuple[np.ndarray, Box]]:
    """Yields BGR frames of noise and the box of a bright textured square that crosses them."""
    random = np.random.RandomState(seed)
    width, height = size
    scene = cv2.resize(random.randint(0, 120, (12, 16, 3)).astype(np.uint8), size)
    skin = cv2.resize(random.randint(120, 256, (6, 6, 3)).astype(np.uint8), (32, 32))
    for i in range(frames):
        frame = scene.copy()
        x = int((width - 32) * (0.5 + 0.4 * np.sin(i / 9)))
        y = int((height - 32) * (0.5 + 0.3 * np.cos(i / 7)))
        frame[y : y + 32, x : x + 32] = skin
        yield frame, Box(x, y, 32, 32)


class FakeCapture:
    """The part of ``cv2.VideoCapture`` that a live source uses, following a script.

    Args:
        rate: frames per second; 0 for as fast as asked.
        dies_after: frames after which ``grab`` fails; None for never.
        hangs_after: frames after which ``grab`` blocks (for ``hang`` seconds).
        clock: counts frames across reconnects.
    """

    def __init__(
        self,
        rate: float = 0,
        dies_after: Optional[int] = None,
        hangs_after: Optional[int] = None,
        hang: float = 1.0,
        size: Tuple[int, int] = (64, 48),
    ) -> None:
        self.rate, self.dies_after, self.hangs_after, self.hang = rate, dies_after, hangs_after, hang
        self.frame = np.zeros((size[1], size[0], 3), np.uint8)
        self.count = 0
        self.released = False
        self.began = monotonic()

    def get(self, prop: int) -> float:
        return self.rate

    def grab(self) -> bool:
        if self.dies_after is not None and self.count >= self.dies_after:
            return False
        if self.hangs_after is not None and self.count >= self.hangs_after:
            sleep(self.hang)
            return False
        self.count += 1
        if self.rate:
            sleep(max(0.0, self.began + self.count / self.rate - monotonic()))
        return True

    def retrieve(self) -> Tuple[bool, np.ndarray]:
        image = self.frame.copy()
        image[0, 0, 0] = self.count % 256
        return True, image

    def release(self) -> None:
        self.released = True


class Script:
    """``connect`` of a live source: hands out the given captures in turn; an exception is raised."""

    def __init__(self, *steps: Any) -> None:
        self.steps: List[Any] = list(steps)
        self.used: List[Any] = []

    def __call__(self) -> Any:
        if not self.steps:
            raise SourceError("nobody answers")
        step = self.steps.pop(0)
        if isinstance(step, BaseException):
            raise step
        self.used.append(step)
        return step
