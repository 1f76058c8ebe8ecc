"""The crop kernel, compiled for the host from its real source, equals OpenCV bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path
from types import SimpleNamespace
from typing import Any
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest

from asymtrack_edge.errors import BackendError
from asymtrack_edge.geometry import Cropper, CropWindow
from asymtrack_edge.runtime.backends.cuda import kernel
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD

HEIGHT, WIDTH = 270, 360
STD = 255 * np.float32(IMAGE_STD)
SCALE, OFFSET = 1 / STD, 255 * np.float32(IMAGE_MEAN) / STD  # red, green, blue


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    return cv2.GaussianBlur(np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8), (3, 3), 0)


def by_kernel(
    driver: ctypes.CDLL, frame: np.ndarray, window: CropWindow, size: int, as_bytes: bool = False, rgb: bool = False
) -> np.ndarray:
    record = np.zeros(1, kernel.WINDOW)
    out = np.zeros((size, size, 3), np.uint8) if as_bytes else np.zeros((3, size, size), np.float32)
    left, top, right, bottom = kernel.covered((window,), frame.shape)
    assert left <= right and top <= bottom
    shown = np.full_like(frame, 77)  # a GPU only gets the part of the frame that is copied below
    shown[top:bottom, left:right] = frame[top:bottom, left:right]
    kernel.write_windows(record, (window,), shown.ctypes.data, frame.strides[0], frame.shape, rgb)
    grid = (ctypes.c_int * 6)(*kernel.grid(size, 1), *kernel.BLOCK)
    numbers = (ctypes.c_float * 6)(*SCALE, *OFFSET)
    there = ctypes.c_void_p(record.ctypes.data)
    driver.fake_crop(grid, there, ctypes.c_void_p(out.ctypes.data), size, int(as_bytes), numbers)
    return out


@pytest.mark.parametrize("size", [128, 256, 384])
@pytest.mark.parametrize("side", [2, 7, 100, 128, 131, 256, 257, 512, 768, 900])
def test_equals_opencv(driver: ctypes.CDLL, frame: np.ndarray, size: int, side: int) -> None:
    swapped = np.ascontiguousarray(frame[..., ::-1])
    for left, top in (
        ((WIDTH - side) // 2, (HEIGHT - side) // 2),
        (-side // 3, HEIGHT - side // 2),
        (WIDTH - side, HEIGHT - side - 1),
        (WIDTH + 5, -side - 3),
    ):
        window, crop = CropWindow(left, top, side, (0.0, 0.0)), np.zeros((size, size, 3), np.uint8)
        Cropper().crop(frame, window, crop)
        planes = np.moveaxis(crop[..., ::-1] * SCALE - OFFSET, 2, 0)
        np.testing.assert_array_equal(by_kernel(driver, frame, window, size), planes)
        np.testing.assert_array_equal(by_kernel(driver, frame, window, size, as_bytes=True), crop)
        np.testing.assert_array_equal(by_kernel(driver, swapped, window, size, as_bytes=True, rgb=True), crop)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = MagicMock(side_effect=lambda source, capability: b"\x7fELF" + repr(capability).encode())
    monkeypatch.setattr(kernel, "compile_kernel", compile_)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert kernel.crop_module((8, 7)) == kernel.crop_module((8, 7)) != kernel.crop_module((7, 2))
    assert compile_.call_count == 2, "once for each architecture"
    (kept,) = tmp_path.rglob("*sm72.cubin")
    kept.write_bytes(b"cut short")
    kernel.crop_module((7, 2))
    assert compile_.call_count == 3, "a damaged file must not be loaded"
    monkeypatch.setattr(kernel, "SOURCE", kernel.SOURCE + " ")
    kernel.crop_module((8, 7))
    assert compile_.call_count == 4, "another source must be compiled"
    # A folder in which nothing can be stored.
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    assert kernel.crop_module((8, 9)).startswith(b"\x7fELF")


def test_compilers_are_tried_in_turn_and_their_results_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def nvrtc(fails: str) -> Any:
        calls = ("nvrtcCreateProgram", "nvrtcCompileProgram", "nvrtcGetProgramLogSize", "nvrtcGetProgramLog")
        calls += ("nvrtcGetCUBINSize", "nvrtcGetCUBIN", "nvrtcDestroyProgram")
        return SimpleNamespace(**{name: lambda *_, code=7 * (name == fails): code for name in calls})

    for fails in ("nvrtcCreateProgram", "nvrtcGetCUBINSize", "nvrtcGetCUBIN"):
        monkeypatch.setattr(kernel, "_nvrtc", lambda: iter([nvrtc(fails)]))  # noqa: B023
        with pytest.raises(BackendError, match="NVRTC failed with error 7"):
            kernel.compile_kernel("", (8, 7))
    older = nvrtc("nvrtcCompileProgram")  # a compiler older than the GPU; another one may be newer
    monkeypatch.setattr(kernel, "_nvrtc", lambda: iter([older, nvrtc("")]))
    assert kernel.compile_kernel("", (12, 0)) == b""
    monkeypatch.setattr(kernel, "_nvrtc", lambda: iter([older]))
    with pytest.raises(BackendError, match="refused the crop kernel"):
        kernel.compile_kernel("", (12, 0))
    monkeypatch.setattr(kernel, "_nvrtc", lambda: iter(()))
    with pytest.raises(BackendError, match="install libnvrtc"):
        kernel.compile_kernel("", (7, 2))
