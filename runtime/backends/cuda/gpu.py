"""Which GPUs there are, asked of the driver itself: no CUDA package, no context, no device memory."""

from __future__ import annotations

import ctypes
from dataclasses import dataclass
from typing import Any, Tuple

from asymtrack_edge.errors import BackendError

#: The driver's library, by the names under which systems have it.
LIBRARIES = ("libcuda.so.1", "libcuda.so", "nvcuda.dll")

_MAJOR, _MINOR, _INTEGRATED = 75, 76, 18  # CUdevice_attribute


class NoGpuError(BackendError):
    """No GPU at all can be used here."""


@dataclass(frozen=True)
class Gpu:
    """One GPU.

    Attributes:
        index: as CUDA counts.
        name: as the driver gives it, ``"Xavier"`` or ``"NVIDIA GeForce RTX 2080 Ti"``.
        compute_capability: major and minor.
        integrated: whether it shares its memory with the CPU, as on a Jetson.
    """

    index: int
    name: str
    compute_capability: Tuple[int, int]
    integrated: bool


def load_driver() -> Any:
    """Returns the CUDA driver's library, initialised.

    Raises:
        NoGpuError: there is no driver, or it cannot start.
    """
    for name in LIBRARIES:
        try:
            driver = ctypes.CDLL(name)
        except OSError:
            continue
        code = driver.cuInit(0)
        if code:
            raise NoGpuError(f"the CUDA driver cannot start (error {code}): there is no GPU that it can see")
        return driver
    raise NoGpuError("there is no CUDA driver here (no libcuda.so.1), so no NVIDIA GPU can be used")


def find_gpu(index: int = 0) -> Gpu:
    """Describes the GPU with this index.

    Raises:
        NoGpuError: there is no driver, or no GPU.
        BackendError: there is no such GPU.
    """
    driver = load_driver()
    count = ctypes.c_int()
    _check(driver.cuDeviceGetCount(ctypes.byref(count)))
    if not 0 <= index < count.value:
        if not count.value:
            raise NoGpuError("the CUDA driver knows no GPU: is one plugged in, and visible to this user or container?")
        there = ", ".join(str(i) for i in range(count.value))
        raise BackendError(f"there is no GPU {index}: the driver knows {there}; choose another --device")
    device = ctypes.c_int()
    _check(driver.cuDeviceGet(ctypes.byref(device), index))
    name = ctypes.create_string_buffer(256)
    _check(driver.cuDeviceGetName(name, len(name), device))
    major, minor, integrated = (_attribute(driver, code, device) for code in (_MAJOR, _MINOR, _INTEGRATED))
    return Gpu(index, name.value.decode(errors="replace"), (major, minor), bool(integrated))


def _attribute(driver: Any, attribute: int, device: ctypes.c_int) -> int:
    value = ctypes.c_int()
    _check(driver.cuDeviceGetAttribute(ctypes.byref(value), attribute, device))
    return value.value


def _check(code: int) -> None:
    if code:
        raise BackendError(f"the CUDA driver answered with error {code} when asked for its GPUs")
