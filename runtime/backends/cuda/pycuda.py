"""CUDA through PyCUDA; what PyCUDA lacks (graphs, waiting for foreign streams) stays with the driver."""

from __future__ import annotations

import threading
from ctypes import c_void_p
from typing import Any, List, Sequence, Tuple

import numpy as np
import pycuda.driver as cuda

from asymtrack_edge.errors import BackendError
from asymtrack_edge.runtime.backends.cuda.driver import CAPTURE_LOCK, CudaDevice, HostBuffer, Launch


def _translated(function: Any) -> Any:
    """Turns PyCUDA's errors into ``BackendError``."""

    def translated(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except cuda.Error as error:
            raise BackendError(f"CUDA failed: {error}") from None

    return translated


class PycudaDevice(CudaDevice):
    """A GPU whose context, stream, memory and kernels are PyCUDA's."""

    @_translated
    def _open_context(self, device: int) -> None:
        cuda.init()
        context = cuda.Device(self.gpu.index).retain_primary_context()
        self._held.enter = _translated(context.push)
        self._held.leave = _translated(cuda.Context.pop)
        driver, opened_by = self.driver, threading.get_ident()

        def release() -> None:
            # PyCUDA pushes the context to detach it and does not pop it: other code on this thread
            # must find its own context current.
            before = driver.get(c_void_p, "cuCtxGetCurrent")
            context.detach()
            if driver.get(c_void_p, "cuCtxGetCurrent") != before:
                driver.get(c_void_p, "cuCtxPopCurrent_v2")
            if threading.get_ident() != opened_by:  # in another thread, PyCUDA only forgets the context
                driver.try_call("cuDevicePrimaryCtxRelease_v2", device)

        self._held.release = release

    @_translated
    def _make_stream(self) -> int:
        # In a list, which is emptied to release the stream while the context still exists.
        self._streams = [cuda.Stream(1)]  # CU_STREAM_NON_BLOCKING
        self._held.undo["stream"] = self._streams.clear
        return int(self._streams[0].handle)

    @_translated
    def allocate(self, size: int) -> int:
        """Allocates device memory as ``CudaDevice`` does, with PyCUDA."""
        with CAPTURE_LOCK:
            allocation = cuda.mem_alloc(size)
        address = int(allocation)
        self._held.undo[address] = allocation.free
        self.zero(address, size)
        return address

    @_translated
    def pinned(self, size: int, mapped: bool = False) -> HostBuffer:
        """Allocates page-locked memory as ``CudaDevice`` does, with PyCUDA."""
        flags = cuda.host_alloc_flags.PORTABLE | (cuda.host_alloc_flags.DEVICEMAP if mapped else 0)
        with CAPTURE_LOCK:
            array = cuda.pagelocked_empty(size, np.uint8, mem_flags=flags)
        array[...] = 0
        self._held.undo[array.ctypes.data] = array.base.free
        return HostBuffer(array, int(array.base.get_device_pointer()) if mapped else 0)

    @_translated
    def kernel(self, module: bytes, name: str, types: str) -> Launch:
        """Loads a kernel as ``CudaDevice`` does, as a PyCUDA module that is unloaded before its context is released."""
        module_, streams = cuda.module_from_buffer(module), self._streams
        functions = [module_.get_function(name)]
        functions[0].prepare(types)

        @_translated
        def launch(grid: Sequence[int], block: Sequence[int], arguments: Tuple[Any, ...]) -> None:
            functions[0].prepared_async_call(tuple(grid), tuple(block), streams[0], *arguments)

        held: List[Any] = [module_]

        def unload() -> None:
            functions.clear()
            held.clear()

        self._held.undo[("module", id(held))] = unload
        return launch
