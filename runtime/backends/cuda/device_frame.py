"""Frames that are on the GPU already: taken where they are, by the two protocols that arrays share.

``__cuda_array_interface__`` (CuPy, PyTorch, Numba, PyCUDA) and DLPack (those, and JAX and others).
"""

from __future__ import annotations

import ctypes
from typing import Any, NamedTuple, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import FrameError


class DeviceFrame(NamedTuple):
    """A BGR uint8 frame in device memory.

    Attributes:
        address: of its first byte.
        shape: height, width, 3.
        pitch: bytes from row to row.
        stream: CUDA stream on which it was made (0: the default stream); None if it is ready.
        owner: keeps it alive while it is read.
    """

    address: int
    shape: Tuple[int, int, int]
    pitch: int
    stream: Optional[int]
    owner: Any


def is_device_frame(frame: Any) -> bool:
    """Whether ``frame`` says that it lies in device memory."""
    if isinstance(frame, np.ndarray):
        return False
    if hasattr(frame, "__cuda_array_interface__"):
        return True
    return hasattr(frame, "__dlpack__") and frame.__dlpack_device__()[0] in _CUDA_KINDS


def device_frame(frame: Any, stream: int = 0, device: int = 0) -> DeviceFrame:
    """Describes a frame in device memory.

    Args:
        frame: BGR uint8 ``(H, W, 3)``, pixels contiguous, rows at any distance.
        stream: CUDA stream on which it is going to be read; DLPack's owner makes it wait.
        device: index of the GPU that is going to read it.

    Raises:
        FrameError: not such a frame, or one on another GPU.
    """
    dlpack = hasattr(frame, "__dlpack__")
    if dlpack:
        kind, index = (int(value) for value in frame.__dlpack_device__())
        if kind != _CUDA_HOST and index != device:
            raise FrameError(f"the frame lies on GPU {index}, the tracker runs on GPU {device}: copy it over")
    interface = getattr(frame, "__cuda_array_interface__", None)
    # Before version 3 (PyTorch) the interface does not tell the stream that the frame is made on;
    # the owner of a DLPack tensor orders its stream before ours.
    if interface is None or (dlpack and interface.get("version", 0) < 3):
        return _from_dlpack(frame, stream)
    return _from_interface(frame)


def _from_interface(frame: Any) -> DeviceFrame:
    interface = frame.__cuda_array_interface__
    shape, strides = tuple(interface["shape"]), interface.get("strides")
    pitch = _check(shape, np.dtype(interface["typestr"]) == np.uint8, strides)
    # Before version 3 nothing says on which stream it was made: assume the default stream. From
    # version 3 on no stream means that it is ready.
    stream = interface.get("stream") if interface.get("version", 0) >= 3 else 0
    return DeviceFrame(int(interface["data"][0]), shape, pitch, stream, frame)


def _check(shape: Sequence[int], is_uint8: bool, strides: Optional[Sequence[int]]) -> int:
    """Checks type, shape and strides in bytes; returns the pitch."""
    if len(shape) != 3 or shape[2] != 3 or shape[0] < 2 or shape[1] < 2:
        raise FrameError(f"a frame on the GPU has shape (height, width, 3), got {tuple(shape)}")
    if not is_uint8:
        raise FrameError("a frame on the GPU is uint8 with values 0..255: scale and convert it")
    if strides is None:
        return int(shape[1]) * 3
    if strides[2] != 1 or strides[1] != 3 or strides[0] < shape[1] * 3:
        raise FrameError(f"a frame on the GPU has contiguous pixels, got strides {tuple(strides)}: copy it")
    return int(strides[0])


_CUDA_HOST = 3
_CUDA_KINDS = (2, _CUDA_HOST, 13)  # kDLCUDA, kDLCUDAHost, kDLCUDAManaged
_UNSIGNED = 1


class _DLTensor(ctypes.Structure):
    _fields_ = (
        ("data", ctypes.c_void_p),
        ("device_type", ctypes.c_int32),
        ("device_id", ctypes.c_int32),
        ("ndim", ctypes.c_int32),
        ("code", ctypes.c_uint8),
        ("bits", ctypes.c_uint8),
        ("lanes", ctypes.c_uint16),
        ("shape", ctypes.POINTER(ctypes.c_int64)),
        ("strides", ctypes.POINTER(ctypes.c_int64)),
        ("byte_offset", ctypes.c_uint64),
    )


_get_pointer = ctypes.pythonapi.PyCapsule_GetPointer
_get_pointer.restype = ctypes.c_void_p
_get_pointer.argtypes = (ctypes.py_object, ctypes.c_char_p)


def _from_dlpack(frame: Any, stream: int) -> DeviceFrame:
    # The capsule is not consumed: it gives the tensor back itself when it is dropped.
    capsule = frame.__dlpack__(stream=stream or None)
    tensor = _DLTensor.from_address(_get_pointer(capsule, b"dltensor"))
    shape = tuple(tensor.shape[i] for i in range(tensor.ndim))
    strides = tuple(tensor.strides[i] for i in range(tensor.ndim)) if tensor.strides else None
    pitch = _check(shape, (tensor.code, tensor.bits, tensor.lanes) == (_UNSIGNED, 8, 1), strides)
    address = int(tensor.data or 0) + tensor.byte_offset
    # The owner has ordered its work before ours: nothing left to wait for.
    return DeviceFrame(address, (shape[0], shape[1], 3), pitch, None, (frame, capsule))
