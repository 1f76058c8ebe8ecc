"""The crop kernel, compiled for the host from its real source, equals OpenCV bit for bit."""

from __future__ import annotations

import ctypes
from pathlib import Path
from typing import Any, Tuple
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
    grid, numbers = np.array([*kernel.grid(size, 1), *kernel.BLOCK], np.int32), np.concatenate([SCALE, OFFSET])
    driver.fake_crop(grid.ctypes, record.ctypes, out.ctypes, size, int(as_bytes), numbers.ctypes)
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


def load(capability: Tuple[int, int] = (8, 7), refuses: bytes = b"13") -> Any:
    """The kernel's code, as a driver gets it that refuses code which contains ``refuses``."""
    cuda = MagicMock(**{"gpu.compute_capability": capability})
    cuda.kernel = lambda module, *_: kernel._check(refuses in module) or module
    return kernel.load_crop(cuda)


def test_it_is_compiled_once(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    compile_ = MagicMock(side_effect=lambda library, capability: b"\x7fELF" + repr(capability).encode() + library)
    monkeypatch.setattr(kernel, "_by_nvrtc", compile_)
    monkeypatch.setattr(kernel, "_nvrtc", lambda: iter([b"13", b"12"]))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    assert load() == load() == b"\x7fELF(8, 7)12" != load((7, 2))
    assert compile_.call_count == 4, "once by each compiler for each architecture"
    (kept,) = tmp_path.rglob("*sm72.cubin")
    kept.write_bytes(b"cut short")
    assert load((7, 2)) and compile_.call_count == 6, "a damaged file must not be loaded"
    monkeypatch.setattr(kernel, "SOURCE", kernel.SOURCE + " ")
    assert load() and compile_.call_count == 8, "another source must be compiled"
    assert load(refuses=b"12").endswith(b"13"), "what the driver refuses must not be kept"
    monkeypatch.setenv("XDG_CACHE_HOME", str(kept))
    assert load((8, 9)).startswith(b"\x7fELF"), "it is not needed that a folder can be written to"


def test_compilers_are_tried_in_turn_and_their_results_checked(monkeypatch: pytest.MonkeyPatch) -> None:
    def nvrtc(fails: str) -> Any:
        return type("Nvrtc", (), {"__getattr__": lambda _, name: lambda *_: 7 * (name == fails)})()

    libraries = [nvrtc(f"nvrtc{name}") for name in ("CreateProgram", "GetCUBINSize", "GetCUBIN", "CompileProgram")]
    monkeypatch.setattr(kernel, "_nvrtc", lambda: libraries)
    monkeypatch.setattr(kernel, "cache_file", lambda name: None)
    with pytest.raises(BackendError, match=r"fits .*NVRTC failed with error 7; NVRTC refused it: .*: install libnvrtc"):
        load()
    libraries.append(nvrtc(""))  # newer than the GPU, unlike the one before
    assert load((12, 0)) == b""
    with pytest.raises(BackendError, match="error True"):
        load(refuses=b"")
    libraries.clear()
    with pytest.raises(BackendError, match="found for the crop kernel: install libnvrtc"):
        load()
