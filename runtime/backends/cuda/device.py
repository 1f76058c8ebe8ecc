"""What the TensorRT backend needs of CUDA, and which package provides it.

PyCUDA where it is installed; otherwise the driver itself, called through ctypes, so that a device
needs no package to compile. Both work in the GPU's primary context, the one that PyTorch and every
other user of the CUDA runtime share, and make it current only while one of our calls runs.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any, Callable, Iterator, Optional, Sequence

import numpy as np

from asymtrack_edge.runtime.backends.cuda.gpu import Gpu, find_gpu


class Graph(ABC):
    """A captured sequence of copies and launches."""

    @abstractmethod
    def launch(self) -> None:
        """Queues all of it on the stream it was captured on."""

    @abstractmethod
    def close(self) -> None:
        """Gives it back."""


@dataclass
class HostBuffer:
    """Page-locked host memory.

    Attributes:
        array: uint8, one axis.
        device_address: where the GPU sees the same bytes, 0 where it does not.
        owner: keeps the memory alive.
    """

    array: np.ndarray
    device_address: int
    owner: Any = None


class CudaDevice(ABC):
    """One GPU, one stream on it, and the memory that was taken there.

    All copies and launches are queued on the stream and return at once. Every call but ``current``
    has to be made inside ``with device.current():``.

    Attributes:
        gpu: which one.
        stream: CUDA's handle of the stream.
        name: of the package that makes the calls.
    """

    gpu: Gpu
    stream: int
    name: str

    @abstractmethod
    def enter(self) -> None:
        """Makes the primary context current in this thread."""

    @abstractmethod
    def leave(self) -> None:
        """Makes the context current again that was so before."""

    @contextmanager
    def current(self) -> Iterator[None]:
        """The primary context, current for the length of a block."""
        self.enter()
        try:
            yield
        finally:
            self.leave()

    @abstractmethod
    def allocate(self, size: int) -> int:
        """Takes device memory, aligned to 256 bytes and filled with zeros; returns its address."""

    @abstractmethod
    def free(self, address: int) -> None:
        """Gives device memory back before ``close`` does."""

    @abstractmethod
    def pinned(self, size: int, mapped: bool = False) -> HostBuffer:
        """Takes page-locked host memory; ``mapped``: the GPU can use it in place."""

    @abstractmethod
    def release(self, buffer: HostBuffer) -> None:
        """Gives page-locked memory back before ``close`` does."""

    @abstractmethod
    def upload(self, target: int, source: np.ndarray) -> None:
        """Copies a contiguous host array to a device address."""

    @abstractmethod
    def download(self, target: np.ndarray, source: int) -> None:
        """Copies from a device address into a contiguous host array."""

    @abstractmethod
    def copy(self, target: int, source: int, size: int) -> None:
        """Copies between device addresses."""

    @abstractmethod
    def kernel(
        self, module: bytes, name: str, types: str
    ) -> Callable[[Sequence[int], Sequence[int], Sequence[Any]], None]:
        """Loads a kernel; returns a function of grid, block and arguments that launches it.

        Args:
            module: machine code (cubin) or PTX.
            name: of the kernel.
            types: of its arguments, a letter each: P address, i int32, f float32.
        """

    @abstractmethod
    def synchronise(self) -> None:
        """Waits until everything queued on the stream is done."""

    @abstractmethod
    def wait_for(self, stream: int) -> None:
        """Makes our stream wait for what is queued on another one now (0: the default stream)."""

    @abstractmethod
    def capture(self, work: Callable[[], None]) -> Optional[Graph]:
        """Records what ``work`` queues as a CUDA graph, without running it.

        Returns:
            The graph, or None where it cannot be captured.
        """

    @abstractmethod
    def close(self) -> None:
        """Gives back stream, memory and context."""


def open_cuda(index: int = 0) -> CudaDevice:
    """Opens a GPU with PyCUDA, or where that is missing with the driver alone.

    Raises:
        BackendError: there is no driver or no such GPU.
    """
    gpu = find_gpu(index)
    try:
        from asymtrack_edge.runtime.backends.cuda.pycuda import PycudaDevice
    except ImportError:
        from asymtrack_edge.runtime.backends.cuda.driver import DriverDevice

        return DriverDevice(gpu)
    return PycudaDevice(gpu)
