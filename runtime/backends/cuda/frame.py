"""The way of a frame to the GPU: only what the windows show is copied, once, through pinned memory.

A frame that lies in device memory already is read where it is.
"""

from __future__ import annotations

from typing import Any, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.geometry import CropWindow
from asymtrack_edge.runtime.backends.cuda import crop as cuda_crop
from asymtrack_edge.runtime.backends.cuda.device import CudaDevice, HostBuffer
from asymtrack_edge.runtime.backends.cuda.device_frame import device_frame, is_device_frame


class FrameBuffer:
    """Brings the part of a frame that windows show to where the GPU can read it.

    Args:
        cuda: the GPU; its context has to be current when the buffer is written.
    """

    def __init__(self, cuda: CudaDevice) -> None:
        self._cuda = cuda
        self._mapped = cuda.gpu.integrated
        self._host: Optional[HostBuffer] = None
        self._device = 0
        self._kept: Any = None

    def write(self, frame: Any, windows: Sequence[CropWindow], records: Sequence[np.ndarray], step: int = 1) -> None:
        """Queues the upload of a frame and writes the records of its windows.

        Args:
            frame: BGR uint8 ``(H, W, 3)``, on the host or on the device.
            windows: of all targets.
            records: arrays of ``cuda_crop.WINDOW`` to write them to, ``step`` to each array.
            step: see ``records``.

        Raises:
            FrameError: a frame on the device that cannot be used.
        """
        if is_device_frame(frame):
            there = device_frame(frame, self._cuda.stream, self._cuda.gpu.index)
            if there.stream is not None:
                self._cuda.wait_for(there.stream)
            pixels, pitch, shape = there.address, there.pitch, there.shape
            # The owner keeps the memory alive until the next frame replaces it.
            self._kept = there.owner
        else:
            pixels, pitch = self._upload(frame, windows)
            shape = frame.shape
        for i in range(0, len(windows), step):
            cuda_crop.write_windows(records[i // step], windows[i : i + step], pixels, pitch, shape)

    def _upload(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> Tuple[int, int]:
        """Stages and uploads what the windows show; returns address of the frame's origin, and pitch."""
        left, top, right, bottom = cuda_crop.covered(windows, frame.shape)
        width, height = right - left, bottom - top
        if not width:
            return 0, 0
        self._grow(frame.nbytes)
        assert self._host is not None
        staged = self._host.array[: width * height * 3]
        np.copyto(staged.reshape(height, width, 3), frame[top:bottom, left:right])
        address = self._host.device_address
        if not address:
            self._cuda.upload(self._device, staged)
            address = self._device
        # Only pixels inside the staged part are read; the origin may lie before the buffer.
        return (address - top * width * 3 - left * 3) % 2**64, width * 3

    def _grow(self, size: int) -> None:
        """Makes room for a whole frame, so that frames of one size never allocate again."""
        if self._host is not None and self._host.array.nbytes >= size:
            return
        # Forgotten before they are given back: should there be no memory for the larger ones, no later
        # frame may be written to what is not ours any more.
        host, device = self._host, self._device
        self._host, self._device = None, 0
        if host is not None:
            self._cuda.release(host)
        if device:
            self._cuda.free(device)
        if not self._mapped:
            self._device = self._cuda.allocate(size)
        self._host = self._cuda.pinned(size, self._mapped)
