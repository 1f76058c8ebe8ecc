"""CUDA source to a GPU's machine code: by NVRTC, the compiler as a library, or by nvcc.

Machine code and not PTX: a compiler that is newer than the driver writes PTX that the driver
refuses.
"""

from __future__ import annotations

import ctypes
import ctypes.util
import glob
import os
import shutil
import subprocess
import sys
import tempfile
from contextlib import suppress
from pathlib import Path
from typing import Any, Iterator, List, Optional, Tuple

from asymtrack_edge.errors import BackendError

#: Where CUDA toolkits put things beside the loader's path; JetPack has them under /usr/local/cuda.
_TOOLKITS = ("/usr/local/cuda", "/opt/cuda")


def compile_kernel(source: str, compute_capability: Tuple[int, int]) -> bytes:
    """Compiles CUDA source for a GPU; returns a module to load (cubin).

    Raises:
        BackendError: there is no compiler, or it refused the source.
    """
    refusals: List[BackendError] = []
    for library in _nvrtc():
        try:
            return _by_nvrtc(library, source, compute_capability)
        except BackendError as refusal:  # perhaps it is older than the GPU, and another one is not
            refusals.append(refusal)
    nvcc = _nvcc()
    if nvcc is not None:
        return _by_nvcc(nvcc, source, compute_capability)
    if refusals:
        raise refusals[-1]
    raise BackendError(
        "no CUDA compiler found for the crop kernel: install libnvrtc (on a Jetson: sudo apt install "
        "cuda-nvrtc-11-4, or the one of your CUDA; elsewhere: pip install nvidia-cuda-nvrtc-cu12), or put "
        "nvcc on PATH"
    )


def _nvrtc() -> Iterator[Any]:
    """The NVRTC libraries there are, the system's first."""
    names: List[str] = ["libnvrtc.so"]
    found = ctypes.util.find_library("nvrtc")
    if found:
        names.insert(0, found)
    for toolkit in (os.environ.get("CUDA_HOME", ""), *_TOOLKITS):
        names += sorted(glob.glob(f"{toolkit}/lib64/libnvrtc.so*")) if toolkit else []
    for folder in sys.path:
        # The wheels nvidia-cuda-nvrtc*.
        names += sorted(glob.glob(f"{folder}/nvidia/cuda_nvrtc/lib/libnvrtc.so*"))
        names += sorted(glob.glob(f"{folder}/nvidia/cu*/lib/libnvrtc.so*"))
    for name in names:
        with suppress(OSError):
            yield ctypes.CDLL(name)


def _by_nvrtc(library: Any, source: str, compute_capability: Tuple[int, int]) -> bytes:
    if not hasattr(library, "nvrtcGetCUBIN"):
        raise BackendError("this NVRTC is older than CUDA 11.1: install a newer one")
    program = ctypes.c_void_p()
    library.nvrtcCreateProgram(ctypes.byref(program), source.encode(), b"asymtrack.cu", 0, None, None)
    try:
        option = "--gpu-architecture=sm_{}{}".format(*compute_capability).encode()
        options = (ctypes.c_char_p * 1)(option)
        if library.nvrtcCompileProgram(program, 1, options):
            log = _nvrtc_output(library, "ProgramLog", program).rstrip(b"\0")
            raise BackendError(f"NVRTC refused the crop kernel: {log.decode(errors='replace').strip()}")
        return _nvrtc_output(library, "CUBIN", program)
    finally:
        library.nvrtcDestroyProgram(ctypes.byref(program))


def _nvrtc_output(library: Any, what: str, program: ctypes.c_void_p) -> bytes:
    """What NVRTC holds of a program."""
    size = ctypes.c_size_t()
    getattr(library, f"nvrtcGet{what}Size")(program, ctypes.byref(size))
    text = ctypes.create_string_buffer(size.value)
    getattr(library, f"nvrtcGet{what}")(program, text)
    return text.raw


def _nvcc() -> Optional[str]:
    beside = [f"{toolkit}/bin/nvcc" for toolkit in (os.environ.get("CUDA_HOME", ""), *_TOOLKITS) if toolkit]
    return shutil.which("nvcc") or next((path for path in beside if os.access(path, os.X_OK)), None)


def _by_nvcc(nvcc: str, source: str, compute_capability: Tuple[int, int]) -> bytes:
    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "asymtrack.cu"
        file.write_text(source)
        architecture = "-arch=sm_{}{}".format(*compute_capability)
        command = [nvcc, "-cubin", architecture, str(file), "-o", str(file.with_suffix(".cubin"))]
        done = subprocess.run(command, capture_output=True, text=True, check=False)
        if done.returncode:
            raise BackendError(f"nvcc refused the crop kernel: {done.stderr.strip()}")
        return file.with_suffix(".cubin").read_bytes()
