"""Frames to verify a model on: the user's clip, or one made from noise."""

from __future__ import annotations

from itertools import islice
from typing import Iterator, List, Optional, Sequence, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.geometry import Box, check_box
from asymtrack_edge.runtime.sources import open_source

LONGEST = 48  #: most frames that are read of a clip
Clip = Tuple[List[np.ndarray], Box]  #: BGR uint8 frames, and the target in the first of them


def _texture(random: np.random.RandomState, height: int, width: int, contrast: float) -> np.ndarray:
    """Noise of several scales around a random colour, float32 ``(height, width, 3)``."""
    texture = np.full((height, width, 3), random.uniform(70, 180, 3), np.float32)
    for cells, strength in ((3, 1.0), (8, 0.7), (24, 0.4)):
        noise = random.normal(0, contrast * strength, (cells, cells, 3)).astype(np.float32)
        texture += cv2.resize(noise, (width, height), interpolation=cv2.INTER_CUBIC)
    return texture


def synthetic_clip(
    frames: int = 36, size: Tuple[int, int] = (360, 270), seed: int = 0
) -> Iterator[Tuple[np.ndarray, Box]]:
    """Yields BGR uint8 frames of ``size`` (width, height) and the box of a textured ellipse that moves in them."""
    random = np.random.RandomState(seed)
    width, height = size
    scene = _texture(random, height, width, 35)
    skin = _texture(random, 96, 96, 50)
    for i in range(frames):
        phase = 2 * np.pi * i / 36
        w = int(52 + 10 * np.sin(phase * 1.3))
        h = int(44 + 8 * np.cos(phase))
        x = int(width / 2 + 0.28 * width * np.sin(phase) - w / 2)
        y = int(height / 2 + 0.22 * height * np.sin(2 * phase) - h / 2)
        frame = np.roll(scene, i // 2, axis=1)
        mask = np.zeros((h, w), np.uint8)
        cv2.ellipse(mask, (w // 2, h // 2), (w // 2 - 1, h // 2 - 1), 0, 0, 360, 255, -1, cv2.LINE_AA)
        alpha = mask[..., None].astype(np.float32) / 255
        region = frame[y : y + h, x : x + w]
        region += alpha * (cv2.resize(skin, (w, h)) - region)
        frame += random.normal(0, 3, frame.shape).astype(np.float32)
        yield np.clip(frame, 0, 255).astype(np.uint8), Box(x, y, w, h)


def default_clip(frames: int = 36, size: Tuple[int, int] = (360, 270), seed: int = 0) -> Clip:
    """The synthetic clip as frames and first box."""
    pairs = list(synthetic_clip(frames, size, seed))
    return [frame for frame, _ in pairs], pairs[0][1]


def clip_argument(source: Optional[str], box: Optional[Sequence[float]]) -> Optional[Clip]:
    """The clip of ``--clip`` (a video or folder) and ``--box`` (in its first frame); None without both."""
    if source is None and box is None:
        return None
    if source is None or box is None:
        raise UsageError("--clip and --box go together: the target is marked in the clip's first frame")
    with open_source(source) as opened:
        frames = list(islice((frame for frame in opened if frame is not None), LONGEST))
    if len(frames) < 2:
        raise SourceError(f"{opened.name} has fewer than two readable frames: choose another")
    return frames, check_box(box, frames[0].shape)
