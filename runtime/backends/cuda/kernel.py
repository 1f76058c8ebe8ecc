"""The crop as one CUDA kernel: from a window of a frame to the network's input, with OpenCV's arithmetic.

The kernel does what ``geometry.Cropper`` and ``HostBackend`` do on the CPU, bit for bit like
``cv2.resize``: 11-bit fixed-point weights, the special case of scaling by exactly one half, the black border,
and the frame's last column and row, which count as border. One thread makes one pixel. The windows are in
device memory, so that a captured graph never has to be captured again.

The kernel is compiled once for each kind of GPU, and the machine code is kept in the user's cache. It is machine
code and not PTX, because a driver refuses PTX from a compiler that is newer than itself. It may refuse machine code
from a newer compiler, too: CUDA 13 writes it in another file format than CUDA 12.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import hashlib
import os
import sys
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError, UsageError
from asymtrack_edge.files import write_bytes
from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.manifest import UINT8_BGR, Manifest
from asymtrack_edge.runtime.backends.base import scale_and_offset
from asymtrack_edge.runtime.backends.cuda.driver import CudaDevice, Launch

#: What the kernel reads for one target: address of the frame's pixel (0, 0), bytes from row to row,
#: size of the frame, top-left pixel and side of the window, whether the frame is RGB rather than BGR.
_INTEGERS = ("pitch", "width", "height", "left", "top", "side", "rgb", "unused")
WINDOW = np.dtype([("pixels", "<u8"), *((name, "<i4") for name in _INTEGERS)])

KERNEL = "asymtrack_crop"

#: Types of its arguments: windows, images, size, and what ``pixel_arguments`` returns.
TYPES = "PPiiffffff"

#: Threads of a block: a row of 32 is one warp that writes 128 consecutive bytes of each plane.
BLOCK = (32, 8, 1)

SOURCE = Path(__file__).with_name("crop.cu").read_text(encoding="utf-8")


def grid(size: int, targets: int) -> Tuple[int, int, int]:
    """Blocks of a launch that makes crops of ``size`` pixels for ``targets`` targets."""
    return -(-size // BLOCK[0]), -(-size // BLOCK[1]), targets


def pixel_arguments(manifest: Manifest) -> Tuple[Any, ...]:
    """The kernel's arguments after the size: whether it writes bytes, then scale and offset of red, green, blue."""
    return (int(manifest.input_format == UINT8_BGR), *np.concatenate(scale_and_offset(manifest)).tolist())


def write_windows(
    out: np.ndarray, windows: Sequence[CropWindow], pixels: int, pitch: int, shape: Sequence[int], rgb: bool = False
) -> None:
    """Writes the kernel's records for the windows of one frame to ``out``, an array of ``WINDOW``.

    ``pixels`` is the device address of the frame's pixel (0, 0), ``pitch`` the bytes from row to row, ``shape``
    begins with height and width, and ``rgb`` says whether the channels are red, green, blue.
    """
    for i, window in enumerate(windows):
        out[i] = (pixels, pitch, shape[1], shape[0], window.left, window.top, window.side, rgb, 0)


def covered(windows: Sequence[CropWindow], shape: Sequence[int]) -> Tuple[int, int, int, int]:
    """The smallest rectangle that holds all that the windows show of a frame: left, top, right, bottom; or zeros."""
    rows, columns = shape[0] - 1, shape[1] - 1  # the last row and column are border
    boxes: Any = [
        (max(w.left, 0), max(w.top, 0), min(w.left + w.side, columns), min(w.top + w.side, rows)) for w in windows
    ]
    boxes = [box for box in boxes if box[2] > box[0] and box[3] > box[1]]
    if not boxes:
        return 0, 0, 0, 0
    lefts, tops, rights, bottoms = zip(*boxes)
    return min(lefts), min(tops), max(rights), max(bottoms)


def load_crop(cuda: CudaDevice) -> Launch:
    """The kernel on a GPU, from the user's cache or compiled, as from ``CudaDevice.kernel``.

    ``BackendError`` without a compiler that knows the GPU and whose code the driver takes.
    """
    digest = hashlib.sha256(SOURCE.encode()).hexdigest()[:16]
    kept = cache_file("crop-{}-sm{}{}.cubin".format(digest, *cuda.gpu.compute_capability))
    if kept is not None:
        with suppress(OSError, BackendError):  # the driver may have been replaced by an older one
            if (content := kept.read_bytes()).startswith(b"\x7fELF"):
                return cuda.kernel(content, KERNEL, TYPES)
    refusals: List[str] = []
    for library in _nvrtc():
        try:
            module = _by_nvrtc(library, cuda.gpu.compute_capability)
            launch = cuda.kernel(module, KERNEL, TYPES)
        except BackendError as refusal:  # it may be older than the GPU, or newer than the driver; another may fit
            refusals.append(str(refusal))
            continue
        if kept is not None:
            with suppress(OSError, UsageError):  # without a cache it only takes longer
                kept.parent.mkdir(parents=True, exist_ok=True)
                write_bytes(kept, module)
        return launch
    fits = f"here fits this GPU and driver ({'; '.join(dict.fromkeys(refusals))})" if refusals else "found"
    raise BackendError(
        f"no CUDA compiler {fits} for the crop kernel: install libnvrtc of the driver's CUDA version (on a Jetson: "
        "sudo apt install cuda-nvrtc-11-4, or the one of your CUDA; elsewhere: pip install nvidia-cuda-nvrtc-cu12)"
    )


def cache_file(name: str) -> Optional[Path]:
    """Path of a file kept between runs, below XDG_CACHE_HOME or ~/.cache; None without a home directory."""
    base = os.environ.get("XDG_CACHE_HOME")
    try:
        return (Path(base) if base else Path.home() / ".cache") / "asymtrack-edge" / name
    except (KeyError, RuntimeError):  # KeyError: before Python 3.10, for an unknown user
        return None


def _nvrtc() -> Iterator[Any]:
    """The NVRTC libraries that can be loaded, the system's first."""
    names = list(filter(None, (ctypes.util.find_library("nvrtc"), "libnvrtc.so")))
    # Toolkits put it outside the loader's path; JetPack's is the second.
    for toolkit in (os.environ.get("CUDA_HOME", ""), "/usr/local/cuda", "/opt/cuda"):
        names += sorted(glob.glob(f"{toolkit}/lib64/libnvrtc.so*")) if toolkit else []
    for folder in sys.path:
        # The wheels nvidia-cuda-nvrtc* put it in cuda_nvrtc or cu13.
        names += sorted(glob.glob(f"{folder}/nvidia/cu*/lib/libnvrtc.so*"))
    for name in names:
        with suppress(OSError):
            yield ctypes.CDLL(name)


def _by_nvrtc(library: Any, compute_capability: Tuple[int, int]) -> bytes:
    if not hasattr(library, "nvrtcGetCUBIN"):
        raise BackendError("this NVRTC is older than CUDA 11.1: install a newer one")
    program = ctypes.c_void_p()
    _check(library.nvrtcCreateProgram(ctypes.byref(program), SOURCE.encode(), b"asymtrack.cu", 0, None, None))
    try:
        options = (ctypes.c_char_p * 1)("--gpu-architecture=sm_{}{}".format(*compute_capability).encode())
        if library.nvrtcCompileProgram(program, 1, options):
            log = _nvrtc_output(library, "ProgramLog", program).rstrip(b"\0").decode(errors="replace")
            raise BackendError(f"NVRTC refused it: {' '.join(log.split())}")
        return _nvrtc_output(library, "CUBIN", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_output(library: Any, what: str, program: ctypes.c_void_p) -> bytes:
    """An output of NVRTC for a program: its log or cubin."""
    size = ctypes.c_size_t()
    _check(getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size)))
    text = ctypes.create_string_buffer(size.value)
    _check(getattr(library, f"nvrtcGet{what}")(program, text))
    return text.raw


def _check(code: int) -> None:
    if code:
        raise BackendError(f"NVRTC failed with error {code}")
