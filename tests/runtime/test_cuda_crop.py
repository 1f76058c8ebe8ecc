"""The crop kernel, compiled for the host from its very source, against OpenCV: equal to the bit."""

from __future__ import annotations

import ctypes
import shutil
from pathlib import Path
from typing import Tuple

import cv2
import numpy as np
import pytest

from asymtrack_edge.errors import BackendError
from asymtrack_edge.geometry import Cropper, CropWindow
from asymtrack_edge.runtime.backends.cuda import compile as cuda_compile
from asymtrack_edge.runtime.backends.cuda import crop as cuda_crop
from asymtrack_edge.variants import IMAGE_MEAN, IMAGE_STD
from tests.runtime.fakes import imitation

HEIGHT, WIDTH = 270, 360
STD = 255 * np.float32(IMAGE_STD)
SCALE, OFFSET = 1 / STD, 255 * np.float32(IMAGE_MEAN) / STD


@pytest.fixture(scope="module")
def driver(tmp_path_factory: pytest.TempPathFactory) -> ctypes.CDLL:
    if shutil.which("g++") is None:
        pytest.skip("needs g++")
    return ctypes.CDLL(str(imitation.build_driver(tmp_path_factory.mktemp("driver"))))


@pytest.fixture(scope="module")
def frame() -> np.ndarray:
    noise = np.random.RandomState(0).randint(0, 256, (HEIGHT, WIDTH, 3), np.uint8)
    return cv2.GaussianBlur(noise, (3, 3), 0)


def by_kernel(driver: ctypes.CDLL, frame: np.ndarray, window: CropWindow, size: int) -> np.ndarray:
    record, out = np.zeros(1, cuda_crop.WINDOW), np.zeros((3, size, size), np.float32)
    cuda_crop.write_windows(record, (window,), frame.ctypes.data, frame.strides[0], frame.shape)
    grid = (ctypes.c_int * 6)(*cuda_crop.grid(size, 1), *cuda_crop.BLOCK)
    numbers = (ctypes.c_float * 6)(*SCALE, *OFFSET)
    driver.fake_crop(grid, ctypes.c_void_p(record.ctypes.data), ctypes.c_void_p(out.ctypes.data), size, numbers)
    return out


def by_opencv(frame: np.ndarray, window: CropWindow, size: int) -> np.ndarray:
    crop = np.zeros((size, size, 3), np.uint8)
    Cropper().crop(frame, window, crop)
    planes = crop[..., ::-1].transpose(2, 0, 1).astype(np.float32)
    return planes * SCALE.reshape(3, 1, 1) - OFFSET.reshape(3, 1, 1)


@pytest.mark.parametrize("size", [128, 256, 384])
@pytest.mark.parametrize("place", ["inside", "overhanging", "last column", "outside"])
@pytest.mark.parametrize("side", [1, 2, 7, 100, 128, 131, 256, 257, 512, 768, 900])
def test_equals_opencv(driver: ctypes.CDLL, frame: np.ndarray, size: int, place: str, side: int) -> None:
    left, top = {
        "inside": ((WIDTH - side) // 2, (HEIGHT - side) // 2),
        "overhanging": (-side // 3, HEIGHT - side // 2),
        "last column": (WIDTH - side, HEIGHT - side - 1),
        "outside": (WIDTH + 5, -side - 3),
    }[place]
    window = CropWindow(left, top, side, (0.0, 0.0))
    np.testing.assert_array_equal(by_kernel(driver, frame, window, size), by_opencv(frame, window, size))


def test_only_what_windows_show_is_covered() -> None:
    def window(left: int, top: int, side: int) -> CropWindow:
        return CropWindow(left, top, side, (0.0, 0.0))

    def covered(*windows: CropWindow) -> Tuple[int, int, int, int]:
        return cuda_crop.covered(windows, (100, 200, 3))

    assert covered(window(10, 20, 30)) == (10, 20, 40, 50)
    assert covered(window(-5, 80, 30)) == (0, 80, 25, 99)
    assert covered(window(10, 20, 30), window(50, 5, 10)) == (10, 5, 60, 50)
    assert covered(window(300, 0, 10)) == (0, 0, 0, 0)
    assert covered(window(300, 0, 10), window(190, 0, 20)) == (190, 0, 199, 20)


def test_compiles_for_the_device() -> None:
    try:
        module = cuda_compile.compile_kernel(cuda_crop.SOURCE, (8, 7))
    except BackendError as error:
        pytest.skip(str(error))
    assert module[:4] == b"\x7fELF" and cuda_crop.KERNEL.encode() in module
    with pytest.raises(BackendError, match="refused the crop kernel"):
        cuda_compile.compile_kernel("this is no CUDA", (8, 7))


def test_without_a_compiler_it_says_what_to_install(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(cuda_compile, "_nvrtc", lambda: iter(()))
    monkeypatch.setattr(cuda_compile, "_nvcc", lambda: None)
    with pytest.raises(BackendError, match="install libnvrtc"):
        cuda_compile.compile_kernel(cuda_crop.SOURCE, (7, 2))


def test_a_compiler_older_than_the_gpu_is_not_the_last_word(monkeypatch: pytest.MonkeyPatch) -> None:
    def compile_(library: str, source: str, capability: Tuple[int, int]) -> bytes:
        if library == "old":
            raise BackendError("NVRTC refused the crop kernel: invalid value for --gpu-architecture")
        return library.encode()

    monkeypatch.setattr(cuda_compile, "_by_nvrtc", compile_)
    monkeypatch.setattr(cuda_compile, "_nvcc", lambda: None)
    monkeypatch.setattr(cuda_compile, "_nvrtc", lambda: iter(("old", "new")))
    assert cuda_compile.compile_kernel("", (12, 0)) == b"new"
    monkeypatch.setattr(cuda_compile, "_nvrtc", lambda: iter(("old",)))
    with pytest.raises(BackendError, match="gpu-architecture"):
        cuda_compile.compile_kernel("", (12, 0))


def test_nvcc_serves_as_well() -> None:
    nvcc = cuda_compile._nvcc()
    if nvcc is None:
        pytest.skip("there is no nvcc")
    assert Path(nvcc).name == "nvcc"
    assert cuda_compile._by_nvcc(nvcc, cuda_crop.SOURCE, (8, 7))[:4] == b"\x7fELF"
