"""Access to the GPU through CUDA's driver library, called with ctypes: no package, nothing to compile.

Everything happens in the GPU's primary context, the one that PyTorch and every other user of the CUDA
runtime share. It is current only while one of our calls runs.
"""

from __future__ import annotations

import ctypes
import gc
import logging
import os
import threading
import warnings
import weakref
from contextlib import contextmanager, suppress
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from dataclasses import dataclass
from functools import lru_cache
from typing import Any, Callable, Dict, Iterator, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError

logger = logging.getLogger("asymtrack_edge")

#: Names of the driver's library on different systems.
LIBRARIES = ("libcuda.so.1", "libcuda.so")

#: Held by all code that may allocate, free, wait for the whole GPU, or capture. While ONNX Runtime captures, any of
#: these in another thread of the process fails and ends the capture.
CAPTURE_LOCK = threading.RLock()

_HANDLE = POINTER(c_void_p)

#: The calls that we use, with the types of their arguments. Device addresses are 64-bit integers.
_CALLS: Dict[str, Tuple[Any, ...]] = {
    "cuDeviceGetCount": (POINTER(c_int),),
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDeviceGetName": (c_char_p, c_int, c_int),
    "cuDeviceGetAttribute": (POINTER(c_int), c_int, c_int),
    "cuDeviceTotalMem_v2": (POINTER(c_size_t), c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    **dict.fromkeys(("cuCtxPopCurrent_v2", "cuCtxGetCurrent"), (_HANDLE,)),
    "cuCtxSynchronize": (),
    "cuMemGetInfo_v2": (POINTER(c_size_t), POINTER(c_size_t)),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_ulonglong), c_void_p, c_uint),
    "cuMemsetD8Async": (c_ulonglong, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_ulonglong, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_ulonglong, c_ulonglong, c_size_t, c_void_p),
    **dict.fromkeys(("cuStreamCreate", "cuEventCreate"), (_HANDLE, c_uint)),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuModuleLoadData": (_HANDLE, c_char_p),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    **dict.fromkeys(("cuEventRecord", "cuGraphLaunch"), (c_void_p, c_void_p)),
    **dict.fromkeys(("cuCtxPushCurrent_v2", "cuStreamSynchronize", "cuMemFreeHost", "cuModuleUnload"), (c_void_p,)),
    **dict.fromkeys(("cuStreamDestroy_v2", "cuEventDestroy_v2", "cuGraphDestroy", "cuGraphExecDestroy"), (c_void_p,)),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}

_NON_BLOCKING, _NO_TIMING, _PORTABLE, _MAPPED, _THREAD_LOCAL = 1, 2, 1, 2, 1
_NO_GPU = "the CUDA driver finds no GPU: is one plugged in, and visible to this user or container?"
_ABSENT = (34, 100)  # CUDA_ERROR_STUB_LIBRARY, CUDA_ERROR_NO_DEVICE; others are failures of a driver that has a GPU
_JETSON = "/dev/nvmap"  # a Jetson's driver also reports NO_DEVICE to a user who may not open the GPU
_MULTIPROCESSORS, _INTEGRATED, _MAJOR, _MINOR = 16, 18, 75, 76  # CUdevice_attribute

#: Launches a kernel: grid, block, arguments.
Launch = Callable[[Sequence[int], Sequence[int], Tuple[Any, ...]], None]

_ARGUMENTS: Dict[str, Any] = {"P": c_ulonglong, "i": c_int, "f": c_float}


class NoGpuError(BackendError):
    """There is no usable GPU at all."""


@dataclass(frozen=True)
class Gpu:
    """One GPU."""

    index: int  # CUDA's number
    name: str  # from the driver: "Xavier" or "NVIDIA GeForce RTX 2080 Ti"
    compute_capability: Tuple[int, int]  # major and minor
    integrated: bool = False  # whether it shares its memory with the CPU, as on a Jetson
    multiprocessors: int = 0  # boards of the same name may differ in them
    memory: int = 0  # bytes


def load_driver() -> Any:
    """Loads and starts the CUDA driver; ``NoGpuError`` without it or a GPU, ``BackendError`` if it cannot start."""
    for name in LIBRARIES:
        try:
            library = ctypes.CDLL(name)
        except OSError:
            continue
        code = library.cuInit(0)
        jetson = os.path.exists(_JETSON)
        if code in _ABSENT and not jetson:
            raise NoGpuError(_NO_GPU)
        if code:
            advice = "is this user in the groups video and render?" if jetson else "see what nvidia-smi says"
            raise BackendError(f"the CUDA driver cannot start (error {code}): {advice}")
        return library
    advice = "install NVIDIA's; a container needs --gpus all, on a Jetson --runtime nvidia"
    raise NoGpuError(f"there is no CUDA driver here (no libcuda.so.1): {advice}")


class Driver:
    """The driver's functions, with typed arguments; they raise ``BackendError`` when they fail."""

    def __init__(self) -> None:
        library = load_driver()
        self._functions: Dict[str, Any] = {}
        for name, types in _CALLS.items():
            function = getattr(library, name, None)
            if function is None:
                raise BackendError(f"the CUDA driver is too old (it has no {name}): update it to CUDA 11.4")
            # Our own prototype: the library object's would be shared with other users of ctypes.
            self._functions[name] = ctypes.CFUNCTYPE(c_int, *types)((name, library))

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function; ``BackendError`` if it fails."""
        if code := self.try_call(name, *arguments):
            raise BackendError(f"{name} failed with {self.error_name(code)}")

    def try_call(self, name: str, *arguments: Any) -> int:
        """Calls a function and returns its error code."""
        return int(self._functions[name](*arguments))

    def error_name(self, code: int) -> str:
        """The driver's name of an error."""
        text = c_char_p()
        self.try_call("cuGetErrorName", code, ctypes.byref(text))
        return (text.value or str(code).encode()).decode()

    def get(self, kind: Any, name: str, *arguments: Any) -> int:
        """Calls a function that writes a number of type ``kind`` to its first argument; returns it."""
        made = kind()
        self.call(name, ctypes.byref(made), *arguments)
        return int(made.value or 0)


def find_gpu(index: int = 0) -> Gpu:
    """Describes a GPU without making a context; ``NoGpuError`` without any, ``BackendError`` without this one."""
    driver = Driver()
    count = driver.get(c_int, "cuDeviceGetCount")
    if not 0 <= index < count:
        if not count:
            raise NoGpuError(_NO_GPU)
        there = ", ".join(f"cuda:{i}" for i in range(count))
        raise BackendError(f"there is no GPU cuda:{index}: the driver finds {there}; choose another --device")
    device = driver.get(c_int, "cuDeviceGet", index)
    name = ctypes.create_string_buffer(256)
    driver.call("cuDeviceGetName", name, len(name), device)
    major, minor, integrated, multiprocessors = (
        driver.get(c_int, "cuDeviceGetAttribute", code, device)
        for code in (_MAJOR, _MINOR, _INTEGRATED, _MULTIPROCESSORS)
    )
    memory = driver.get(c_size_t, "cuDeviceTotalMem_v2", device)
    return Gpu(index, name.value.decode(errors="replace"), (major, minor), bool(integrated), multiprocessors, memory)


class HostBuffer(NamedTuple):
    """Page-locked host memory."""

    array: np.ndarray  # uint8, one axis
    device_address: int  # the GPU's address of the same bytes; 0 without one


class Graph:
    """A captured sequence of copies and launches. It keeps ``work``, which queued it, and all that ``work`` holds."""

    def __init__(self, cuda: CudaDevice, runnable: int, work: Callable[[], None]) -> None:
        self._cuda, self._runnable, self._work = cuda, runnable, work

    def __call__(self) -> None:
        """Queues the sequence on the stream it was captured on."""
        self._cuda.driver.call("cuGraphLaunch", self._runnable, self._cuda.stream)

    def close(self) -> None:
        """Releases the graph."""
        self._cuda.free(self._runnable)


class _Held:
    """Releases a device's resources, newest first; holds no reference to the device, whose finalizer calls it."""

    def __init__(self) -> None:
        self.undo: Dict[Any, Callable[[], Any]] = {}
        nothing: Callable[[], Any] = lambda: None  # noqa: E731
        self.enter = self.leave = self.release = self.wait = nothing

    def give_back(self) -> None:
        with CAPTURE_LOCK, suppress(BackendError):  # a driver that has shut down has released everything
            self.enter()
            self.wait()
            while self.undo:
                with suppress(Exception):  # a failure must not keep the rest
                    self.undo.popitem()[1]()
            self.leave()
        self.release()


class CudaDevice:
    """One GPU, one stream on it, and the memory allocated there.

    All copies and launches are queued on the stream and return at once. Every call must be made inside
    ``with device.current():``. Everything is released by ``close``, or when the object is dropped.
    ``BackendError`` if the GPU cannot be opened.
    """

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.driver = Driver()
        self._held = _Held()
        self._open_context(self.driver.get(c_int, "cuDeviceGet", gpu.index))
        self._finalizer = weakref.finalize(self, self._held.give_back)
        with self.current():
            # Non-blocking: PyTorch's work on the default stream must not wait for ours, nor ours for it.
            self.stream = self._make_stream()
            driver, event = self.driver, self.driver.get(c_void_p, "cuEventCreate", _NO_TIMING)
            self._event = event
            self._held.undo["event"] = lambda: driver.try_call("cuEventDestroy_v2", event)
            stream = self.stream
            self._held.wait = lambda: driver.try_call("cuStreamSynchronize", stream)

    def _open_context(self, device: int) -> None:
        driver, held = self.driver, self._held
        context = driver.get(c_void_p, "cuDevicePrimaryCtxRetain", device)
        held.enter = lambda: driver.call("cuCtxPushCurrent_v2", context)
        held.leave = lambda: driver.get(c_void_p, "cuCtxPopCurrent_v2")
        held.release = lambda: driver.try_call("cuDevicePrimaryCtxRelease_v2", device)

    def _make_stream(self) -> int:
        driver, stream = self.driver, self.driver.get(c_void_p, "cuStreamCreate", _NON_BLOCKING)
        self._held.undo["stream"] = lambda: driver.try_call("cuStreamDestroy_v2", stream)
        return stream

    @contextmanager
    def current(self) -> Iterator[None]:
        """Makes the primary context current in this thread for the duration of a block."""
        self._held.enter()
        try:
            yield
        finally:
            self._held.leave()

    def allocate(self, size: int) -> int:
        """Allocates device memory, aligned to 256 bytes and filled with zeros; returns its address."""
        driver = self.driver
        with CAPTURE_LOCK:
            address = driver.get(c_ulonglong, "cuMemAlloc_v2", size)
        self._held.undo[address] = lambda: driver.try_call("cuMemFree_v2", address)
        self.zero(address, size)
        return address

    def zero(self, address: int, size: int) -> None:
        """Fills device memory with zeros."""
        self.driver.call("cuMemsetD8Async", address, 0, size, self.stream)
        self.synchronise()

    def free(self, handle: int) -> None:
        """Frees device or host memory (by its address) or a graph (by its handle) before ``close`` does."""
        with CAPTURE_LOCK:
            self._held.undo.pop(handle)()

    def pinned(self, size: int, mapped: bool = False) -> HostBuffer:
        """Allocates page-locked host memory; if ``mapped``, the GPU can use it in place."""
        driver = self.driver
        with CAPTURE_LOCK:
            host = driver.get(c_void_p, "cuMemHostAlloc", size, _PORTABLE | (_MAPPED if mapped else 0))
        self._held.undo[host] = lambda: driver.try_call("cuMemFreeHost", host)
        device = driver.get(c_ulonglong, "cuMemHostGetDevicePointer_v2", host, 0) if mapped else 0
        array = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(host))
        array[...] = 0
        return HostBuffer(array, device)

    def upload(self, to: int, source: np.ndarray) -> None:
        """Copies a contiguous host array to a device address."""
        self.driver.call("cuMemcpyHtoDAsync_v2", to, source.ctypes.data, source.nbytes, self.stream)

    def download(self, to: np.ndarray, source: int) -> None:
        """Copies from a device address into a contiguous host array."""
        self.driver.call("cuMemcpyDtoHAsync_v2", to.ctypes.data, source, to.nbytes, self.stream)

    def copy(self, to: int, source: int, size: int) -> None:
        """Copies ``size`` bytes between device addresses."""
        self.driver.call("cuMemcpyDtoDAsync_v2", to, source, size, self.stream)

    def kernel(self, module: bytes, name: str, types: str) -> Launch:
        """Loads the kernel ``name`` of a cubin; returns a function of grid, block and arguments that launches it.

        ``types`` has a letter for each argument: P address, i int32, f float32. The caller holds ``CAPTURE_LOCK``.
        """
        driver, stream = self.driver, self.stream
        loaded = driver.get(c_void_p, "cuModuleLoadData", module)
        self._held.undo[("module", loaded)] = lambda: driver.try_call("cuModuleUnload", loaded)
        function = driver.get(c_void_p, "cuModuleGetFunction", loaded, name.encode())

        @lru_cache(maxsize=64)  # a step has the same arguments in every frame
        def packed(arguments: Tuple[Any, ...]) -> Tuple[Any, Any]:
            values = [_ARGUMENTS[kind](value) for kind, value in zip(types, arguments)]
            return (c_void_p * len(values))(*(ctypes.addressof(value) for value in values)), values

        def launch(grid: Sequence[int], block: Sequence[int], arguments: Tuple[Any, ...]) -> None:
            driver.call("cuLaunchKernel", function, *grid, *block, 0, stream, packed(arguments)[0], None)

        return launch

    def synchronise(self) -> None:
        """Waits until everything queued on the stream is done."""
        self.driver.call("cuStreamSynchronize", self.stream)

    def synchronise_all(self) -> None:
        """Waits until all work on every stream of this GPU's primary context is done."""
        with CAPTURE_LOCK:  # this would end a capture
            self.driver.call("cuCtxSynchronize")

    def wait_for(self, stream: int) -> None:
        """Makes our stream wait for the work that is now queued on another (1: the default stream)."""
        self.driver.call("cuEventRecord", self._event, stream)
        self.driver.call("cuStreamWaitEvent", self.stream, self._event, 0)

    def capture(self, work: Callable[[], None]) -> Optional[Graph]:
        """Records what ``work`` queues as a CUDA graph, without running it. On failure, logs why and returns None."""
        driver = self.driver
        with CAPTURE_LOCK:
            # Garbage collection may free device memory, which ends a capture.
            collects = gc.isenabled()
            gc.disable()
            try:
                runnable = self._capture(work)
            except BackendError as error:
                logger.warning("the step cannot be captured as a CUDA graph and runs call by call: %s", str(error))
                return None
            finally:
                if collects:
                    gc.enable()
        self._held.undo[runnable] = lambda: driver.try_call("cuGraphExecDestroy", runnable)
        return Graph(self, runnable, work)

    def _capture(self, work: Callable[[], None]) -> int:
        """The handle of a runnable graph of what ``work`` queues; ``BackendError`` if it cannot be captured."""
        driver, graph = self.driver, c_void_p()
        driver.call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL)
        try:
            try:
                work()
            finally:
                # Even after Ctrl-C: a stream that is capturing cannot be waited for.
                code = driver.try_call("cuStreamEndCapture", self.stream, ctypes.byref(graph))
            if code or not graph.value:
                raise BackendError(f"cuStreamEndCapture gave no graph ({driver.error_name(code)})")
            return driver.get(c_void_p, "cuGraphInstantiateWithFlags", graph, 0)
        finally:
            if graph.value:
                driver.try_call("cuGraphDestroy", graph)

    def close(self) -> None:
        """Releases stream, memory and context; calling it again does nothing."""
        self._finalizer()


def open_cuda(index: int = 0) -> CudaDevice:
    """Opens a GPU with PyCUDA if that is installed and works, else with the driver; errors as in ``find_gpu``."""
    gpu = find_gpu(index)
    try:
        with warnings.catch_warnings():
            # PyCUDA warns as well as raises if it was built for another driver.
            warnings.simplefilter("ignore")
            from asymtrack_edge.runtime.backends.cuda.pycuda import PycudaDevice
        return PycudaDevice(gpu)
    except Exception as error:  # not installed, or unusable here in one of many ways
        logger.debug("PyCUDA is not used: %s", str(error))
        return CudaDevice(gpu)
