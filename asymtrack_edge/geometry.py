"""Boxes, crop windows and the way back: the only place that knows coordinate conventions.

Boxes are ``(x, y, w, h)`` floats in frame pixels, top-left corner and size, x to the right, y down,
0-based. Crop windows are squares of whole pixels. The arithmetic is that of the published tracker,
rounding included, because weights trained with it expect it.
"""

from __future__ import annotations

import math
from typing import NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import BoxError, FrameError

#: A tracked box keeps at least this many pixels inside the frame and is at least this large.
MARGIN = 10.0


class Box(NamedTuple):
    """A target in a frame: top-left corner and size, in pixels."""

    x: float
    y: float
    w: float
    h: float

    @property
    def centre(self) -> Tuple[float, float]:
        """The middle, as x and y."""
        return self.x + 0.5 * self.w, self.y + 0.5 * self.h


class CropWindow(NamedTuple):
    """A square of a frame, which it may overhang.

    Attributes:
        left, top: frame coordinates of its first pixel.
        side: pixels per side, at least 1.
        centre: exact centre (x, y) in pixels of the box it was made for; predictions are mapped back about it.
    """

    left: int
    top: int
    side: int
    centre: Tuple[float, float]


#: Windows with a longer side are sampled where they are: padded, they would take 50 MB and more.
LARGEST_PADDED = 4096


def check_frame(frame: np.ndarray) -> np.ndarray:
    """Returns ``frame`` if it is a BGR uint8 ``(H, W, 3)`` image.

    Raises:
        FrameError: it is None, empty, grey, has an alpha channel, or is not uint8.
    """
    if not isinstance(frame, np.ndarray):
        kind = "nothing (the image could not be read?)" if frame is None else type(frame).__name__
        raise FrameError(f"a frame is a numpy array, got {kind}")
    if frame.ndim != 3 or frame.shape[2] != 3:
        hint = {2: "COLOR_GRAY2BGR", 3: "COLOR_BGRA2BGR" if frame.shape[-1:] == (4,) else ""}.get(frame.ndim, "")
        advice = f": convert it with cv2.cvtColor(frame, cv2.{hint})" if hint else ""
        raise FrameError(f"a frame has shape (height, width, 3), got {frame.shape}{advice}")
    if frame.dtype != np.uint8:
        raise FrameError(f"a frame is uint8 with values 0..255, got {frame.dtype}: scale and convert it")
    if frame.shape[0] < 2 or frame.shape[1] < 2:
        raise FrameError(f"a frame of {frame.shape[1]}x{frame.shape[0]} pixels is too small to track in")
    return frame


def check_box(box: Sequence[float], frame_shape: Sequence[int]) -> Box:
    """Returns ``box`` as a ``Box`` if it can be a target in a frame of ``frame_shape`` (H, W, ...).

    Raises:
        BoxError: not four finite numbers, no positive size, or no overlap with the frame.
    """
    try:
        x, y, w, h = (float(v) for v in box)
    except (TypeError, ValueError):
        raise BoxError(f"a box is four numbers x, y, w, h, got {box!r}") from None
    if not all(math.isfinite(v) for v in (x, y, w, h)):
        raise BoxError(f"the box {_show((x, y, w, h))} is not finite")
    if w <= 0 or h <= 0:
        raise BoxError(f"the box {_show((x, y, w, h))} has no area: width and height must be positive")
    height, width = frame_shape[:2]
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise BoxError(f"the box {_show((x, y, w, h))} lies outside the frame of {width}x{height} pixels")
    if max(w, h) > 100 * max(width, height):
        raise BoxError(f"the box {_show((x, y, w, h))} is far larger than the frame of {width}x{height} pixels")
    return Box(x, y, w, h)


def _show(box: Sequence[float]) -> str:
    return ",".join(f"{v:g}" for v in box)


def crop_window(box: Box, factor: float) -> CropWindow:
    """The square around ``box`` whose side is ``ceil(sqrt(w * h) * factor)`` pixels.

    Raises:
        BoxError: the square would be smaller than one pixel.
    """
    side = math.ceil(math.sqrt(box.w * box.h) * factor)
    if side < 1:
        raise BoxError(f"the box {_show(box)} is too small to crop")
    x, y = box.centre
    # Python's round: half to even, as in the published tracker.
    return CropWindow(round(x - side * 0.5), round(y - side * 0.5), side, (x, y))


class Cropper:
    """Cuts windows out of frames and resizes them, reusing its scratch memory between calls."""

    def __init__(self) -> None:
        self._scratch: Optional[np.ndarray] = None

    def crop(self, frame: np.ndarray, window: CropWindow, out: np.ndarray) -> None:
        """Writes the resized window into ``out``.

        What lies outside the frame is black. As published, a window that reaches the last column
        or row of the frame loses it to the border.

        Args:
            frame: ``(H, W, 3)`` uint8.
            window: what to cut.
            out: contiguous ``(S, S, 3)`` uint8, overwritten.
        """
        height, width = frame.shape[:2]
        left, top, side, _ = window
        right, bottom = left + side, top + side
        x0, x1 = max(0, left), right - max(0, right - width + 1)
        y0, y1 = max(0, top), bottom - max(0, bottom - height + 1)
        if x1 <= x0 or y1 <= y0:
            out[...] = 0
            return
        patch = frame[y0:y1, x0:x1]
        if side > LARGEST_PADDED:
            # The same samples, without the border: that of a box larger than the frame could fill the memory.
            step = np.array([side / out.shape[1], side / out.shape[0]])
            shift = step / 2 - 0.5 - (x0 - left, y0 - top)
            matrix = np.hstack([np.diag(step), shift[:, None]])
            flags = cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP
            cv2.warpAffine(patch, matrix, out.shape[1::-1], dst=out, flags=flags)
            return
        if patch.shape[0] != side or patch.shape[1] != side:
            patch = self._pad(patch, y0 - top, x0 - left, side)
        cv2.resize(patch, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)

    def _pad(self, patch: np.ndarray, above: int, before: int, side: int) -> np.ndarray:
        if self._scratch is None or self._scratch.shape[0] < side:
            self._scratch = np.zeros((side, side, 3), np.uint8)
        padded = self._scratch[:side, :side]
        below, after = above + patch.shape[0], before + patch.shape[1]
        padded[:above] = 0
        padded[below:] = 0
        padded[above:below, :before] = 0
        padded[above:below, after:] = 0
        padded[above:below, before:after] = patch
        return padded


def box_from_crop(prediction: Sequence[float], window: CropWindow) -> Box:
    """Maps a prediction to frame pixels.

    Args:
        prediction: cx, cy, w, h in units of the crop's side, 0..1 across the window; more is ignored.
        window: the window that the crop was cut from.
    """
    cx, cy, w, h = (float(v) * window.side for v in prediction[:4])
    x = cx + window.centre[0] - 0.5 * window.side
    y = cy + window.centre[1] - 0.5 * window.side
    return Box(x - 0.5 * w, y - 0.5 * h, w, h)


def clip_box(box: Box, frame_shape: Sequence[int], margin: float = MARGIN) -> Box:
    """Clips a tracked box to the frame.

    Args:
        box: in frame pixels.
        frame_shape: of the frame, (H, W, ...).
        margin: pixels of the box that stay inside the frame on every side, and its least width and height.
    """
    height, width = frame_shape[:2]
    x0 = min(max(0.0, box.x), width - margin)
    x1 = min(max(margin, box.x + box.w), float(width))
    y0 = min(max(0.0, box.y), height - margin)
    y1 = min(max(margin, box.y + box.h), float(height))
    return Box(x0, y0, max(margin, x1 - x0), max(margin, y1 - y0))


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0..1."""
    w = min(a[0] + a[2], b[0] + b[2]) - max(a[0], b[0])
    h = min(a[1] + a[3], b[1] + b[3]) - max(a[1], b[1])
    if w <= 0 or h <= 0:
        return 0.0
    return w * h / (a[2] * a[3] + b[2] * b[3] - w * h)
