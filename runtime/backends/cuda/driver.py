"""CUDA's driver interface through ctypes: serves where PyCUDA is missing, and has the graphs it lacks."""

from __future__ import annotations

import ctypes
from ctypes import POINTER, c_char_p, c_float, c_int, c_size_t, c_uint, c_ulonglong, c_void_p
from typing import Any, Callable, Dict, List, Optional, Sequence, Set, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError
from asymtrack_edge.runtime.backends.cuda.device import CudaDevice, Graph, HostBuffer
from asymtrack_edge.runtime.backends.cuda.gpu import Gpu, load_driver

_HANDLE = POINTER(c_void_p)

#: The calls used and the types of their arguments, device addresses being 64-bit integers.
_CALLS: Dict[str, Tuple[Any, ...]] = {
    "cuDeviceGet": (POINTER(c_int), c_int),
    "cuDevicePrimaryCtxRetain": (_HANDLE, c_int),
    "cuDevicePrimaryCtxRelease_v2": (c_int,),
    "cuCtxPushCurrent_v2": (c_void_p,),
    "cuCtxPopCurrent_v2": (_HANDLE,),
    "cuCtxGetCurrent": (_HANDLE,),
    "cuMemAlloc_v2": (POINTER(c_ulonglong), c_size_t),
    "cuMemFree_v2": (c_ulonglong,),
    "cuMemHostAlloc": (_HANDLE, c_size_t, c_uint),
    "cuMemHostGetDevicePointer_v2": (POINTER(c_ulonglong), c_void_p, c_uint),
    "cuMemFreeHost": (c_void_p,),
    "cuMemsetD8Async": (c_ulonglong, ctypes.c_ubyte, c_size_t, c_void_p),
    "cuMemcpyHtoDAsync_v2": (c_ulonglong, c_void_p, c_size_t, c_void_p),
    "cuMemcpyDtoHAsync_v2": (c_void_p, c_ulonglong, c_size_t, c_void_p),
    "cuMemcpyDtoDAsync_v2": (c_ulonglong, c_ulonglong, c_size_t, c_void_p),
    "cuStreamCreate": (_HANDLE, c_uint),
    "cuStreamDestroy_v2": (c_void_p,),
    "cuStreamSynchronize": (c_void_p,),
    "cuStreamWaitEvent": (c_void_p, c_void_p, c_uint),
    "cuEventCreate": (_HANDLE, c_uint),
    "cuEventRecord": (c_void_p, c_void_p),
    "cuEventDestroy_v2": (c_void_p,),
    "cuModuleLoadData": (_HANDLE, c_char_p),
    "cuModuleUnload": (c_void_p,),
    "cuModuleGetFunction": (_HANDLE, c_void_p, c_char_p),
    "cuLaunchKernel": (c_void_p, *(c_uint,) * 7, c_void_p, POINTER(c_void_p), POINTER(c_void_p)),
    "cuStreamBeginCapture_v2": (c_void_p, c_int),
    "cuStreamEndCapture": (c_void_p, _HANDLE),
    "cuGraphInstantiateWithFlags": (_HANDLE, c_void_p, c_ulonglong),
    "cuGraphLaunch": (c_void_p, c_void_p),
    "cuGraphDestroy": (c_void_p,),
    "cuGraphExecDestroy": (c_void_p,),
    "cuGetErrorName": (c_int, POINTER(c_char_p)),
}

#: Calls without which everything works but graphs (drivers before CUDA 11.4).
_GRAPH_CALLS = ("cuStreamBeginCapture_v2", "cuStreamEndCapture", "cuGraphInstantiateWithFlags")

_NON_BLOCKING, _NO_TIMING, _PORTABLE, _MAPPED, _THREAD_LOCAL = 1, 2, 1, 2, 1

_ARGUMENTS: Dict[str, Any] = {"P": c_ulonglong, "i": c_int, "f": c_float}


class Driver:
    """The driver's functions, with types, raising ``BackendError`` when they fail."""

    def __init__(self) -> None:
        library = load_driver()
        self._functions: Dict[str, Any] = {}
        for name, types in _CALLS.items():
            function = getattr(library, name, None)
            if function is None:
                if name in _GRAPH_CALLS:
                    continue
                raise BackendError(f"the CUDA driver is too old, it has no {name}: update it to CUDA 11.4")
            # A prototype of our own: the library object's would be shared with other users of ctypes.
            self._functions[name] = ctypes.CFUNCTYPE(c_int, *types)((name, library))

    @property
    def has_graphs(self) -> bool:
        """Whether this driver can capture and instantiate graphs."""
        return all(name in self._functions for name in _GRAPH_CALLS)

    def call(self, name: str, *arguments: Any) -> None:
        """Calls a function.

        Raises:
            BackendError: it failed.
        """
        code = self.try_call(name, *arguments)
        if code:
            text = c_char_p()
            self.try_call("cuGetErrorName", code, ctypes.byref(text))
            raise BackendError(f"{name} failed with {(text.value or str(code).encode()).decode()}")

    def try_call(self, name: str, *arguments: Any) -> int:
        """Calls a function and returns its error code."""
        return int(self._functions[name](*arguments))

    def handle(self, name: str, *arguments: Any) -> int:
        """Calls a function that writes a handle to its first argument; returns the handle."""
        made = c_void_p()
        self.call(name, ctypes.byref(made), *arguments)
        return int(made.value or 0)

    def address(self, name: str, *arguments: Any) -> int:
        """Calls a function that writes a device address to its first argument; returns it."""
        made = c_ulonglong()
        self.call(name, ctypes.byref(made), *arguments)
        return int(made.value)


class _DriverGraph(Graph):
    def __init__(self, driver: Driver, runnable: c_void_p, stream: int) -> None:
        self._driver, self._runnable, self._stream = driver, runnable, stream

    def launch(self) -> None:
        self._driver.call("cuGraphLaunch", self._runnable, self._stream)

    def close(self) -> None:
        self._driver.call("cuGraphExecDestroy", self._runnable)


class DriverDevice(CudaDevice):
    """A GPU through the driver alone."""

    name = "CUDA driver"

    def __init__(self, gpu: Gpu) -> None:
        self.gpu = gpu
        self.driver = Driver()
        self._device = c_int()
        self.driver.call("cuDeviceGet", ctypes.byref(self._device), gpu.index)
        self._undo: List[Callable[[], Any]] = []
        self._allocated: Set[int] = set()
        self._pinned: Dict[int, HostBuffer] = {}
        self._open_context()
        with self.current():
            self.stream = self._make_stream()
            self._event = self.driver.handle("cuEventCreate", _NO_TIMING)
            self._undo.append(lambda: self.driver.try_call("cuEventDestroy_v2", self._event))

    def _open_context(self) -> None:
        self._context = self.driver.handle("cuDevicePrimaryCtxRetain", self._device)

    def _make_stream(self) -> int:
        # Not blocking: what PyTorch queues on the default stream must not wait for us, nor we for it.
        stream = self.driver.handle("cuStreamCreate", _NON_BLOCKING)
        self._undo.append(lambda: self.driver.try_call("cuStreamDestroy_v2", stream))
        return stream

    def enter(self) -> None:
        """See ``CudaDevice.enter``."""
        self.driver.call("cuCtxPushCurrent_v2", self._context)

    def leave(self) -> None:
        """See ``CudaDevice.leave``."""
        self.driver.handle("cuCtxPopCurrent_v2")

    def allocate(self, size: int) -> int:
        """See ``CudaDevice.allocate``."""
        address = self.driver.address("cuMemAlloc_v2", size)
        self._allocated.add(address)
        self._zero(address, size)
        return address

    def free(self, address: int) -> None:
        """See ``CudaDevice.free``."""
        self._allocated.remove(address)
        self.driver.call("cuMemFree_v2", address)

    def _zero(self, address: int, size: int) -> None:
        self.driver.call("cuMemsetD8Async", address, 0, size, self.stream)
        self.synchronise()

    def pinned(self, size: int, mapped: bool = False) -> HostBuffer:
        """See ``CudaDevice.pinned``."""
        host = self.driver.handle("cuMemHostAlloc", size, _PORTABLE | (_MAPPED if mapped else 0))
        device = self.driver.address("cuMemHostGetDevicePointer_v2", host, 0) if mapped else 0
        array = np.ctypeslib.as_array((ctypes.c_ubyte * size).from_address(host))
        array[...] = 0
        self._pinned[host] = HostBuffer(array, device, host)
        return self._pinned[host]

    def release(self, buffer: HostBuffer) -> None:
        """See ``CudaDevice.release``."""
        del self._pinned[buffer.owner]
        self.driver.call("cuMemFreeHost", buffer.owner)

    def upload(self, target: int, source: np.ndarray) -> None:
        """See ``CudaDevice.upload``."""
        self.driver.call("cuMemcpyHtoDAsync_v2", target, source.ctypes.data, source.nbytes, self.stream)

    def download(self, target: np.ndarray, source: int) -> None:
        """See ``CudaDevice.download``."""
        self.driver.call("cuMemcpyDtoHAsync_v2", target.ctypes.data, source, target.nbytes, self.stream)

    def copy(self, target: int, source: int, size: int) -> None:
        """See ``CudaDevice.copy``."""
        self.driver.call("cuMemcpyDtoDAsync_v2", target, source, size, self.stream)

    def kernel(
        self, module: bytes, name: str, types: str
    ) -> Callable[[Sequence[int], Sequence[int], Sequence[Any]], None]:
        """See ``CudaDevice.kernel``."""
        loaded = self.driver.handle("cuModuleLoadData", module)
        self._undo.append(lambda: self.driver.try_call("cuModuleUnload", loaded))
        function = self.driver.handle("cuModuleGetFunction", loaded, name.encode())

        def launch(grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]) -> None:
            values = [_ARGUMENTS[kind](value) for kind, value in zip(types, arguments)]
            pointers = (c_void_p * len(values))(*(ctypes.addressof(value) for value in values))
            self.driver.call("cuLaunchKernel", function, *grid, *block, 0, self.stream, pointers, None)

        return launch

    def synchronise(self) -> None:
        """See ``CudaDevice.synchronise``."""
        self.driver.call("cuStreamSynchronize", self.stream)

    def wait_for(self, stream: int) -> None:
        """See ``CudaDevice.wait_for``."""
        self.driver.call("cuEventRecord", self._event, stream)
        self.driver.call("cuStreamWaitEvent", self.stream, self._event, 0)

    def capture(self, work: Callable[[], None]) -> Optional[Graph]:
        """See ``CudaDevice.capture``."""
        driver = self.driver
        if not driver.has_graphs or driver.try_call("cuStreamBeginCapture_v2", self.stream, _THREAD_LOCAL):
            return None
        graph, runnable = c_void_p(), c_void_p()
        whole = False
        try:
            work()
            whole = True
        except BackendError:
            pass  # something in it cannot be captured
        finally:
            # Whatever happened, Ctrl-C included: in a stream that captures nothing can be waited for.
            ended = not driver.try_call("cuStreamEndCapture", self.stream, ctypes.byref(graph)) and graph.value
            if ended and whole:
                whole = not driver.try_call("cuGraphInstantiateWithFlags", ctypes.byref(runnable), graph, 0)
            if ended:
                driver.try_call("cuGraphDestroy", graph)
        return _DriverGraph(driver, runnable, self.stream) if ended and whole else None

    def close(self) -> None:
        """See ``CudaDevice.close``."""
        with self.current():
            self.driver.try_call("cuStreamSynchronize", self.stream)
            for undo in reversed(self._undo):
                undo()
            for address in self._allocated:
                self.driver.try_call("cuMemFree_v2", address)
            for host in self._pinned:
                self.driver.try_call("cuMemFreeHost", host)
        self._undo.clear()
        self._allocated.clear()
        self._pinned.clear()
        self._close_context()

    def _close_context(self) -> None:
        self.driver.try_call("cuDevicePrimaryCtxRelease_v2", self._device)
