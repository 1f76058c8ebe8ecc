"""Brings a frame to the GPU: only the part that the windows show is copied, once, through pinned memory.

A frame that is already in device memory is read in place, through one of two array protocols: DLPack (PyTorch,
CuPy, JAX and others), else ``__cuda_array_interface__`` (Numba, jetson-utils). The owner of a DLPack tensor makes
our stream wait for its own; before version 3, the interface does not name the stream.
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Optional, Sequence, Tuple, Union

import numpy as np

from asymtrack_edge.errors import FrameError
from asymtrack_edge.geometry import CropWindow, check_frame
from asymtrack_edge.runtime.backends.cuda.driver import CudaDevice, HostBuffer
from asymtrack_edge.runtime.backends.cuda.kernel import covered, write_windows


class DeviceFrame(NamedTuple):
    """A uint8 frame in device memory."""

    address: int  # of its first byte
    shape: Tuple[int, int, int]  # height, width, 3
    pitch: int  # bytes from row to row
    #: CUDA stream that wrote it; None if ours already waits for it; ``UNKNOWN`` if the owner does not tell.
    stream: Optional[int]
    rgb: bool  # whether its channels are red, green, blue
    owner: Any  # keeps it alive while it is read


#: Any stream may still be writing the frame.
UNKNOWN = -1


def device_frame(frame: Any, stream: int = 0, device: int = 0) -> Optional[DeviceFrame]:
    """Describes a frame that GPU ``device`` is going to read on ``stream``; None if it is not in GPU memory.

    It is BGR uint8 ``(H, W, 3)`` with contiguous pixels and any row pitch, or RGB if its attribute ``format`` is
    ``"rgb8"``, as in jetson-utils. ``FrameError`` for any other frame, or one on another GPU.
    """
    layout = getattr(frame, "format", "bgr8")
    if hasattr(frame, "__dlpack__"):
        kind, index = (int(value) for value in frame.__dlpack_device__())
        if kind not in _CUDA_KINDS:
            return None
        if index != device:
            raise FrameError(f"the frame is on cuda:{index}, but the tracker runs on cuda:{device}: copy it there")
        return _from_dlpack(frame, stream, _is_rgb(layout))
    interface = getattr(frame, "__cuda_array_interface__", None)
    return None if interface is None else _from_interface(frame, interface, _is_rgb(layout))


def _is_rgb(layout: str) -> bool:
    if layout not in ("rgb8", "bgr8"):
        raise FrameError(f"a frame on the GPU must be bgr8 or rgb8, not {layout}: capture it in one of them")
    return layout == "rgb8"


def _from_interface(frame: Any, interface: Any, rgb: bool) -> DeviceFrame:
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    pitch = _check(shape, np.dtype(interface["typestr"]) == np.uint8, strides)
    # Before version 3, the stream is not stated. jetson-utils does not state it in version 3 either, and converts on
    # its own stream. Numba states None for the default stream (1), although None means ready.
    stream = (interface.get("stream", UNKNOWN) or 1) if interface.get("version", 0) >= 3 else UNKNOWN
    return DeviceFrame(int(interface["data"][0]), shape, pitch, stream, rgb, frame)


def _check(shape: Sequence[int], is_uint8: bool, strides: Optional[Sequence[int]]) -> int:
    """Checks type, shape and strides in bytes; returns the pitch."""
    if len(shape) != 3 or shape[2] != 3 or shape[0] < 2 or shape[1] < 2:
        raise FrameError(f"a frame on the GPU must have shape (height, width, 3), got {tuple(shape)}")
    if not is_uint8:
        raise FrameError("a frame on the GPU must be uint8 with values 0..255: scale and convert it")
    if strides is None:
        return int(shape[1]) * 3
    if strides[2] != 1 or strides[1] != 3 or strides[0] < shape[1] * 3:
        raise FrameError(f"a frame on the GPU must have contiguous pixels, got strides {tuple(strides)}: copy it")
    return int(strides[0])


_CUDA_KINDS = (2, 13)  # kDLCUDA, kDLCUDAManaged


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        *((name, ctypes.c_int32) for name in ("device_type", "device_id", "ndim")),
        *(("code", ctypes.c_uint8), ("bits", ctypes.c_uint8), ("lanes", ctypes.c_uint16)),
        *((name, ctypes.POINTER(ctypes.c_int64)) for name in ("shape", "strides")),
        ("byte_offset", ctypes.c_uint64),
    )


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype, _get_pointer.argtypes = ctypes.c_void_p, (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(frame: Any, stream: int, rgb: bool) -> DeviceFrame:
    # The capsule is not consumed: it releases the tensor itself when it is dropped.
    capsule = frame.__dlpack__(stream=stream or None)
    tensor = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
    axes = tensor.ndim
    shape = tuple(tensor.shape[:axes])
    strides = tuple(tensor.strides[:axes]) if tensor.strides else None
    pitch = _check(shape, (tensor.code, tensor.bits, tensor.lanes) == (1, 8, 1), strides)  # 1: kDLUInt
    address = int(tensor.data or 0) + tensor.byte_offset
    # The owner has made our stream wait for its work already.
    return DeviceFrame(address, (shape[0], shape[1], 3), pitch, None, rgb, (frame, capsule))


class FrameBuffer:
    """Makes the part of a frame that windows show readable for the GPU, whose context must be current."""

    def __init__(self, cuda: CudaDevice) -> None:
        self._cuda = cuda
        self.mapped = False  # whether the GPU reads the staged pixels in place
        self._host: Optional[HostBuffer] = None
        self._device = 0
        self._kept: Optional[DeviceFrame] = None

    def check(self, frame: Any) -> Union[np.ndarray, DeviceFrame]:
        """A frame on host or GPU as ``write`` takes it; ``FrameError`` if it cannot be used."""
        on_device = None
        if not isinstance(frame, np.ndarray):
            with self._cuda.current():  # PyTorch exports tensors of the current GPU only
                on_device = device_frame(frame, self._cuda.stream, self._cuda.gpu.index)
        return check_frame(frame) if on_device is None else on_device

    def write(self, frame: Any, windows: Sequence[CropWindow], records: Sequence[np.ndarray], step: int = 1) -> None:
        """Queues the upload of a frame from ``check`` and writes its windows to ``records``, ``step`` per array."""
        if isinstance(frame, DeviceFrame):
            if frame.stream == UNKNOWN:
                self._cuda.synchronise_all()
            elif frame.stream is not None:
                self._cuda.wait_for(frame.stream)
            pixels, pitch, rgb = frame.address, frame.pitch, frame.rgb
            self._kept = frame  # its owner keeps the memory alive until the next frame replaces it
        else:
            pixels, pitch = self._upload(frame, windows)
            rgb, self._kept = False, None
        for i in range(0, len(windows), step):
            write_windows(records[i // step], windows[i : i + step], pixels, pitch, frame.shape, rgb)

    def _upload(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> Tuple[int, int]:
        """Stages and uploads what the windows show; returns the address of the frame's origin, and the pitch."""
        left, top, right, bottom = covered(windows, frame.shape)
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
        # Forget the buffers before freeing them: if there is no memory for larger ones, no later frame
        # may be written to memory that is no longer ours.
        host, device = self._host, self._device
        self._host, self._device = None, 0
        if host is not None:
            self._cuda.free(host.array.ctypes.data)
        if device:
            self._cuda.free(device)
        if not self.mapped:
            self._device = self._cuda.allocate(size)
        self._host = self._cuda.pinned(size, self.mapped)
