"""CUDA through PyCUDA; graphs and foreign streams, which it does not have, through the driver."""

from __future__ import annotations

from functools import wraps
from typing import Any, Callable, Dict, List, Sequence, TypeVar, cast

import numpy as np
import pycuda.driver as cuda

from asymtrack_edge.errors import BackendError
from asymtrack_edge.runtime.backends.cuda.device import HostBuffer
from asymtrack_edge.runtime.backends.cuda.driver import _NON_BLOCKING, DriverDevice

_Function = TypeVar("_Function", bound=Callable[..., Any])


def _translated(function: _Function) -> _Function:
    """PyCUDA's errors as ours: they share no class with anything."""

    @wraps(function)
    def translated(*arguments: Any, **options: Any) -> Any:
        try:
            return function(*arguments, **options)
        except cuda.Error as error:
            raise BackendError(f"CUDA failed: {error}") from None

    return cast(_Function, translated)


class PycudaDevice(DriverDevice):
    """A GPU through PyCUDA, in the primary context."""

    name = "PyCUDA"

    @_translated
    def _open_context(self) -> None:
        cuda.init()
        self._pycuda_context = cuda.Device(self.gpu.index).retain_primary_context()
        self._allocations: Dict[int, Any] = {}
        self._modules: List[Any] = []

    def _close_context(self) -> None:
        # PyCUDA pushes the context to detach it and does not pop it: who else works on this thread must
        # find their own.
        before = self.driver.handle("cuCtxGetCurrent")
        self._pycuda_context.detach()
        if self.driver.handle("cuCtxGetCurrent") != before:
            self.driver.handle("cuCtxPopCurrent_v2")

    @_translated
    def _make_stream(self) -> int:
        self._pycuda_stream = cuda.Stream(_NON_BLOCKING)
        return int(self._pycuda_stream.handle)

    def enter(self) -> None:
        """See ``CudaDevice.enter``."""
        self._pycuda_context.push()

    def leave(self) -> None:
        """See ``CudaDevice.leave``."""
        cuda.Context.pop()

    @_translated
    def allocate(self, size: int) -> int:
        """See ``CudaDevice.allocate``."""
        allocation = cuda.mem_alloc(size)
        address = int(allocation)
        self._allocations[address] = allocation
        self._zero(address, size)
        return address

    @_translated
    def free(self, address: int) -> None:
        """See ``CudaDevice.free``."""
        self._allocations.pop(address).free()

    @_translated
    def _zero(self, address: int, size: int) -> None:
        cuda.memset_d8_async(address, 0, size, self._pycuda_stream)
        self.synchronise()

    @_translated
    def pinned(self, size: int, mapped: bool = False) -> HostBuffer:
        """See ``CudaDevice.pinned``."""
        flags = cuda.host_alloc_flags.PORTABLE | (cuda.host_alloc_flags.DEVICEMAP if mapped else 0)
        owner = cuda.pagelocked_empty(size, np.uint8, mem_flags=flags)
        owner[...] = 0
        device = int(owner.base.get_device_pointer()) if mapped else 0
        self._allocations[owner.ctypes.data] = owner.base
        return HostBuffer(owner, device, owner.ctypes.data)

    @_translated
    def release(self, buffer: HostBuffer) -> None:
        """See ``CudaDevice.release``."""
        self._allocations.pop(buffer.owner).free()

    @_translated
    def upload(self, target: int, source: np.ndarray) -> None:
        """See ``CudaDevice.upload``."""
        cuda.memcpy_htod_async(target, source, self._pycuda_stream)

    @_translated
    def download(self, target: np.ndarray, source: int) -> None:
        """See ``CudaDevice.download``."""
        cuda.memcpy_dtoh_async(target, source, self._pycuda_stream)

    @_translated
    def copy(self, target: int, source: int, size: int) -> None:
        """See ``CudaDevice.copy``."""
        cuda.memcpy_dtod_async(target, source, size, self._pycuda_stream)

    @_translated
    def kernel(
        self, module: bytes, name: str, types: str
    ) -> Callable[[Sequence[int], Sequence[int], Sequence[Any]], None]:
        """See ``CudaDevice.kernel``."""
        loaded = cuda.module_from_buffer(module)
        function = loaded.get_function(name)
        function.prepare(types)

        @_translated
        def launch(grid: Sequence[int], block: Sequence[int], arguments: Sequence[Any]) -> None:
            function.prepared_async_call(tuple(grid), tuple(block), self._pycuda_stream, *arguments)

        self._modules.append(loaded)
        return launch

    @_translated
    def synchronise(self) -> None:
        """See ``CudaDevice.synchronise``."""
        self._pycuda_stream.synchronize()

    def close(self) -> None:
        """See ``CudaDevice.close``."""
        with self.current():
            self._pycuda_stream.synchronize()
            for undo in reversed(self._undo):
                undo()
            for left in self._allocations.values():
                left.free()
            self._allocations.clear()
            self._modules.clear()
            del self._pycuda_stream
        self._undo.clear()
        self._close_context()
