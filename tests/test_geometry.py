from __future__ import annotations

import math

import cv2
import numpy as np
import pytest
from hypothesis import assume, example, given, settings
from hypothesis import strategies as st

from asymtrack_edge import geometry
from asymtrack_edge.errors import BoxError, FrameError
from asymtrack_edge.geometry import Box, Cropper, CropWindow, check_box, check_frame, clip_box, crop_window

FRAME = np.random.RandomState(0).randint(0, 256, (120, 160, 3)).astype(np.uint8)
#: Shared by all crops, because nothing of an earlier crop may remain visible.
CROPPER = Cropper()


def reference_crop(frame: np.ndarray, box: Box, factor: float, size: int) -> np.ndarray:
    """The published tracker's crop, step by step: slice, pad with zeros, resize."""
    side = math.ceil(math.sqrt(box.w * box.h) * factor)
    x1 = round(box.x + 0.5 * box.w - side * 0.5)
    y1 = round(box.y + 0.5 * box.h - side * 0.5)
    x2, y2 = x1 + side, y1 + side
    left, right = max(0, -x1), max(x2 - frame.shape[1] + 1, 0)
    top, bottom = max(0, -y1), max(y2 - frame.shape[0] + 1, 0)
    inside = frame[y1 + top : y2 - bottom, x1 + left : x2 - right]
    return cv2.resize(cv2.copyMakeBorder(inside, top, bottom, left, right, cv2.BORDER_CONSTANT), (size, size))


@settings(deadline=None)  # a busy machine may pause for longer than an example may take
@example(0.0, 0.0, 160.0, 120.0, 2.0)
@given(st.floats(-20, 150), st.floats(-20, 110), st.floats(3, 90), st.floats(3, 90), st.sampled_from([2.0, 4.0]))
def test_crop_equals_the_published_one(x: float, y: float, w: float, h: float, factor: float) -> None:
    box = Box(x, y, w, h)
    window = crop_window(box, factor)
    # For a window entirely outside the frame, the published tracker fails or slices from the wrong end; ours is black.
    assume(-window.side < window.left < FRAME.shape[1] - 1 and -window.side < window.top < FRAME.shape[0] - 1)
    out = np.empty((64, 64, 3), np.uint8)
    CROPPER.crop(FRAME, window, out)
    assert np.array_equal(out, reference_crop(FRAME, box, factor, 64))


@pytest.mark.parametrize("left", [-3000, -60, 20])
def test_windows_too_large_to_pad_give_the_same_crop(left: int, monkeypatch: pytest.MonkeyPatch) -> None:
    frame = cv2.GaussianBlur(np.random.RandomState(1).randint(0, 256, (900, 1300, 3)).astype(np.uint8), (0, 0), 15)
    window = CropWindow(left, left + 30, 4100, (left + 2050, left + 2080))
    sampled, padded = np.full((128, 128, 3), 9, np.uint8), np.empty((128, 128, 3), np.uint8)
    cropper = Cropper()
    cropper.crop(frame, window, sampled)
    assert cropper._scratch is None
    monkeypatch.setattr(geometry, "LARGEST_PADDED", 5000)
    cropper.crop(frame, window, padded)
    assert padded.max() > 50
    assert np.abs(sampled.astype(int) - padded).max() <= 2


@pytest.mark.parametrize(("x", "y", "side"), [(-64000, -64000, 128000), (500, 500, 40), (20, -50, 40)])
def test_windows_outside_the_frame_are_black_and_need_no_memory(x: int, y: int, side: int) -> None:
    out = np.full((32, 32, 3), 7, np.uint8)
    Cropper().crop(FRAME, CropWindow(x, y, side, (x, y)), out)
    assert not out.any()


@settings(deadline=None)
@given(st.tuples(*[st.floats(-500, 500)] * 2, *[st.floats(0, 500)] * 2))
def test_clipped_boxes_keep_the_margin(values: tuple) -> None:
    x, y, w, h = clip_box(Box(*values), FRAME.shape)
    assert w >= 10 and h >= 10
    assert 0 <= x <= 160 - 10 and 0 <= y <= 120 - 10
    assert x + w <= 160 + 1e-9 and y + h <= 120 + 1e-9
    assert clip_box(Box(50, 115, 30, 4), FRAME.shape) == (50, 110, 30, 10)
    assert clip_box(Box(50, 100, 30, 60), FRAME.shape) == (50, 100, 30, 20)


def test_invalid_boxes_are_refused_with_the_reason() -> None:
    for word, boxes in {
        "four numbers": [(1, 2, 3), "abc", "2041", b"2041"],
        "not finite": [(1, 2, float("nan"), 4), (1, 2, float("inf"), 4)],
        "no area": [(1, 2, 0.5, 4), (1, 2, 4, -5), (0.3, 0.1, 3, 0.5)],
        "outside the frame": [(160, 2, 5, 4), (-5, 2, 5, 4), (2, 120, 5, 4), (2, -4, 5, 4)],
        "far larger": [(0, 0, 1e9, 1e9), (0, 0, 1e9, 5)],
    }.items():
        for box in boxes:
            with pytest.raises(BoxError, match=word):
                check_box(box, FRAME.shape)


def test_invalid_frames_are_refused_with_the_reason() -> None:
    for word, frame in (
        ("could not be read", None),
        ("too small", np.zeros((1, 500, 3), np.uint8)),
        ("COLOR_GRAY2BGR", np.zeros((40, 40), np.uint8)),
        ("COLOR_BGRA2BGR", np.zeros((40, 40, 4), np.uint8)),
        ("transpose it", np.zeros((3, 40, 40), np.uint8)),
        ("uint8", np.zeros((40, 40, 3), np.uint16)),
        ("numpy array", [[1]]),
    ):
        with pytest.raises(FrameError, match=word):
            check_frame(frame)
