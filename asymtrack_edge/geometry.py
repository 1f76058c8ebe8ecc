"""Boxes, crop windows and the mapping between them: the only module that knows coordinate conventions.

Boxes are ``(x, y, w, h)`` floats in frame pixels: top-left corner and size, x to the right, y down,
0-based. Crop windows are squares of whole pixels. The arithmetic, including rounding, is that of the
published tracker, because weights trained with it expect it.
"""

from __future__ import annotations

import math
from typing import Iterable, NamedTuple, Optional, Sequence, Tuple

import cv2
import numpy as np

from asymtrack_edge.errors import BoxError, FrameError

#: A tracked box has at least this width and height, and overlaps the frame by at least as much, in pixels.
MARGIN = 10.0


class Box(NamedTuple):
    """A target in a frame: top-left corner and size, in pixels."""

    x: float
    y: float
    w: float
    h: float

    @property
    def centre(self) -> Tuple[float, float]:
        """The centre (x, y)."""
        return self.x + 0.5 * self.w, self.y + 0.5 * self.h


class CropWindow(NamedTuple):
    """A square window of a frame; it may extend beyond the frame.

    Attributes:
        left, top: frame coordinates of its first pixel.
        side: pixels per side, at least 1.
        centre: exact centre (x, y) in pixels of the box it was made for; predictions are mapped back relative to it.
    """

    left: int
    top: int
    side: int
    centre: Tuple[float, float]


#: Windows with a longer side are sampled without padding, which would take 50 MB or more.
LARGEST_PADDED = 4096


def check_frame(frame: np.ndarray) -> np.ndarray:
    """Returns ``frame`` if it is a BGR uint8 ``(H, W, 3)`` image; else raises ``FrameError``."""
    if not isinstance(frame, np.ndarray):
        kind = "nothing (the image could not be read?)" if frame is None else type(frame).__name__
        if hasattr(frame, "__cuda_array_interface__"):
            kind += " on the GPU, but this backend runs on the CPU"
        raise FrameError(f"a frame is a numpy array (height, width, 3) of BGR bytes, got {kind}")
    if frame.ndim != 3 or frame.shape[2] != 3:
        code = "BGRA2BGR" if frame.shape[-1:] == (4,) else "GRAY2BGR"
        colour = frame.ndim == 2 or (frame.ndim == 3 and frame.shape[2] in (1, 4))
        advice = f"see cv2.cvtColor with COLOR_{code}" if colour else "transpose it, and give one frame at a time"
        raise FrameError(f"a frame has shape (height, width, 3), got {frame.shape}: {advice}")
    if frame.dtype != np.uint8:
        raise FrameError(f"a frame is uint8 with values 0..255, got {frame.dtype}: scale and convert it")
    if min(frame.shape[:2]) < 2:
        raise FrameError(f"a frame of {frame.shape[1]}x{frame.shape[0]} pixels is too small to track in")
    return frame


def check_box(box: Iterable[float], frame_shape: Sequence[int]) -> Box:
    """Returns ``box`` as a ``Box`` if it can be a target in a frame of ``frame_shape`` (H, W, ...).

    Raises:
        BoxError: not four finite numbers, smaller than a pixel, or no overlap with the frame.
    """
    try:
        if isinstance(box, (str, bytes, set)):  # their items could pass for numbers
            raise TypeError
        x, y, w, h = (float(v) for v in box)
    except (OverflowError, TypeError, ValueError):
        raise BoxError(f"a box is four numbers x, y, w, h, got {' '.join(repr(box).split())[:99]}") from None
    what, (height, width) = f"the box {x:g},{y:g},{w:g},{h:g}", frame_shape[:2]
    if not all(math.isfinite(v) for v in (x, y, w, h)):
        raise BoxError(f"{what} is not finite")
    if w < 1 or h < 1:
        raise BoxError(f"{what} has no area: width and height must be at least 1 pixel")
    if x >= width or y >= height or x + w <= 0 or y + h <= 0:
        raise BoxError(f"{what} lies outside the frame of {width}x{height} pixels")
    if max(w, h) > 100 * max(width, height):
        raise BoxError(f"{what} is far larger than the frame of {width}x{height} pixels")
    return Box(x, y, w, h)


def crop_window(box: Box, factor: float) -> CropWindow:
    """The square window around ``box``, with a side of ``ceil(sqrt(w * h) * factor)`` pixels; w and h are above 0."""
    side = math.ceil(math.sqrt(box.w * box.h) * factor)
    x, y = box.centre
    # Python's round: half to even, as in the published tracker.
    return CropWindow(round(x - side * 0.5), round(y - side * 0.5), side, (x, y))


class Cropper:
    """Cuts windows out of frames and resizes them, reusing its scratch memory between calls."""

    def __init__(self) -> None:
        self._scratch: Optional[np.ndarray] = None

    def crop(self, frame: np.ndarray, window: CropWindow, out: np.ndarray) -> None:
        """Writes the resized window of ``frame`` (``(H, W, 3)`` uint8) into ``out`` (contiguous ``(S, S, 3)`` uint8).

        Pixels outside the frame are black. As in the published tracker, the frame's last column or row
        is also black in a window that reaches it.
        """
        height, width = frame.shape[:2]
        left, top, side, _ = window
        right, bottom = left + side, top + side
        x0, x1 = max(0, left), min(right, width - 1)
        y0, y1 = max(0, top), min(bottom, height - 1)
        if x1 <= x0 or y1 <= y0:
            out[...] = 0
            return
        patch = frame[y0:y1, x0:x1]
        if side > LARGEST_PADDED:
            # The same samples without the border, which for a box larger than the frame could fill the memory.
            step = np.array([side / out.shape[1], side / out.shape[0]])
            shift = step / 2 - 0.5 - (x0 - left, y0 - top)
            matrix = np.hstack([np.diag(step), shift[:, None]])
            cv2.warpAffine(patch, matrix, out.shape[1::-1], dst=out, flags=cv2.INTER_LINEAR | cv2.WARP_INVERSE_MAP)
            return
        if patch.shape[:2] != (side, side):
            if self._scratch is None or len(self._scratch) < side:
                self._scratch = np.empty((side, side, 3), np.uint8)
            borders = (y0 - top, bottom - y1, x0 - left, right - x1)
            patch = cv2.copyMakeBorder(patch, *borders, cv2.BORDER_CONSTANT, dst=self._scratch[:side, :side])
        cv2.resize(patch, (out.shape[1], out.shape[0]), dst=out, interpolation=cv2.INTER_LINEAR)


def box_from_crop(prediction: Sequence[float], window: CropWindow) -> Box:
    """Maps a prediction (cx, cy, w, h in units of the crop's side; further values are ignored) to frame pixels."""
    _, _, side, (x, y) = window
    cx, cy, w, h = map(float, prediction[:4])
    w, h = w * side, h * side
    return Box(cx * side + x - 0.5 * side - 0.5 * w, cy * side + y - 0.5 * side - 0.5 * h, w, h)


def clip_box(box: Box, frame_shape: Sequence[int]) -> Box:
    """Clips a tracked box to a frame of ``frame_shape`` (H, W, ...), see ``MARGIN``."""
    x0, y0, w, h = box
    x1, y1, (height, width) = x0 + w, y0 + h, frame_shape[:2]
    x0, x1 = min(max(0.0, x0), width - MARGIN), min(max(MARGIN, x1), float(width))
    y0, y1 = min(max(0.0, y0), height - MARGIN), min(max(MARGIN, y1), float(height))
    return Box(x0, y0, max(MARGIN, x1 - x0), max(MARGIN, y1 - y0))


def overlaps(boxes: np.ndarray, others: np.ndarray) -> np.ndarray:
    """Intersection over union of boxes ``(N, 4)`` x, y, w, h, row by row: float64 ``(N,)``, 0..1."""
    low = np.maximum(boxes[:, :2], others[:, :2])
    high = np.minimum(boxes[:, :2] + boxes[:, 2:], others[:, :2] + others[:, 2:])
    common = np.clip(high - low, 0, None).prod(1)
    union = boxes[:, 2:].prod(1) + others[:, 2:].prod(1) - common
    ratio: np.ndarray = np.divide(common, union, out=np.zeros_like(common), where=union > 0)
    return ratio.clip(0, 1)


def iou(a: Sequence[float], b: Sequence[float]) -> float:
    """Intersection over union of two boxes, 0..1."""
    return float(overlaps(np.array([a], np.float64), np.array([b], np.float64))[0])
