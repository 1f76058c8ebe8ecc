"""What a tracker needs of an inference backend.

A backend holds the template state of any number of targets in numbered slots. The state stays in
the buffers it was computed into: the search network reads it from there on every frame.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from typing import Any, Dict, Sequence

import numpy as np

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import CropWindow, check_frame
from asymtrack_edge.manifest import Manifest, TensorSpec


def device_index(device: str) -> int:
    """The number of a GPU: 1 for ``"cuda:1"``, 0 for ``"cuda"`` and ``"auto"``; ``UsageError`` for another name."""
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", str(device))
    if match is None:
        raise UsageError(f"the device {device!r} is no GPU: choose auto, cuda or cuda:N")
    return int(match.group(1) or 0)


def nbytes(spec: TensorSpec) -> int:
    """Bytes of a tensor for one target."""
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize


class Backend(ABC):
    """Runs the template and search networks for the targets in its slots."""

    name = ""  # of asymtrack_edge.runtime.BACKENDS
    on_cpu = False  # whether the networks run on the CPU
    integrated = False  # whether they run on a GPU that shares the CPU's memory, as on a Jetson
    threads = 0  # CPU threads that they use; 0 on a GPU
    capacity = 0  # slots that exist

    def __init__(self, manifest: Manifest, description: str) -> None:
        self.manifest = manifest
        self.description = description  # the backend and what it runs on, for people
        self.precision = manifest.precision  # or that of the arithmetic where it is another one (bf16)
        self.seconds: Dict[str, float] = {"crop": 0.0, "infer": 0.0}  # time spent so far

    def check_frame(self, frame: Any) -> Sequence[int]:
        """Returns the shape of a frame, BGR uint8 ``(H, W, 3)``; ``FrameError`` if it is none that can be used here."""
        return check_frame(frame).shape

    @abstractmethod
    def reserve(self, slots: int) -> None:
        """Makes room for at least this many targets; what the slots hold stays."""

    @abstractmethod
    def template(self, frame: np.ndarray, window: CropWindow, slot: int = 0) -> None:
        """Runs the template network on a window of ``frame`` and keeps its outputs in ``slot``."""

    @abstractmethod
    def search(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> np.ndarray:
        """Runs the search network for the targets in slots 0, 1, ... on one window of ``frame`` each.

        Returns float32 ``(len(windows), 5)``: cx, cy, w, h in units of the window's side, and score. A view that the
        next call overwrites.
        """

    @abstractmethod
    def move(self, source: int, target: int) -> None:
        """Copies the state in one slot over that in another."""

    def close(self) -> None:  # noqa: B027 - most backends hold nothing that Python does not give back
        """Gives back what the backend holds; it cannot be used afterwards."""
