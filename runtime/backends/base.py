"""The interface of an inference backend, and what backends that crop on the CPU share.

A backend holds the template state of any number of targets in numbered slots. The state stays in
the backend's buffers: the search network reads it from there on every frame.
"""

from __future__ import annotations

import re
from abc import ABC, abstractmethod
from time import perf_counter
from typing import Any, Dict, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import BackendError, UsageError
from asymtrack_edge.geometry import Cropper, CropWindow, check_frame
from asymtrack_edge.manifest import UINT8_BGR, Manifest, TensorSpec


def device_index(device: str) -> int:
    """The number of a GPU: 1 for ``"cuda:1"``, 0 for ``"cuda"`` and ``"auto"``; ``UsageError`` for any other name."""
    match = re.fullmatch(r"auto|cuda(?::(\d+))?", device)
    if match is None:
        raise UsageError(f"unknown device {device!r}: choose auto, cuda or cuda:N, or cpu with a CPU backend")
    return int(match.group(1) or 0)


def nbytes(spec: TensorSpec) -> int:
    """The size of a tensor for one target, in bytes."""
    return int(np.prod(spec.shape)) * np.dtype(spec.dtype).itemsize


def scale_and_offset(manifest: Manifest) -> Tuple[np.ndarray, np.ndarray]:
    """Scale and offset, float32 ``(3,)`` each: normalised RGB is ``bytes * scale - offset``."""
    std = 255.0 * np.asarray(manifest.std, np.float32)
    return 1 / std, 255.0 * np.asarray(manifest.mean, np.float32) / std


class Backend(ABC):
    """Runs the template and search networks for the targets in its slots."""

    name = ""  # as in asymtrack_edge.runtime.BACKENDS, or "triton"
    on_cpu = False  # whether the networks run on the CPU
    integrated = False  # whether the networks run on a GPU that shares the CPU's memory, as on a Jetson
    threads = 0  # CPU threads that the networks use; 0 on a GPU
    capacity = 0  # number of slots

    def __init__(self, manifest: Manifest, description: str) -> None:
        self.manifest = manifest
        self.description = description  # the backend and what it runs on, for users
        self.precision = manifest.precision  # or that of the arithmetic, where it differs (bf16)
        self.seconds: Dict[str, float] = {"crop": 0.0, "infer": 0.0}  # time spent so far

    def check_frame(self, frame: Any) -> Any:
        """Returns a frame, BGR uint8 ``(H, W, 3)``, as ``template`` and ``search`` take it, with its ``shape``.

        An array on the host stays as it is. ``FrameError`` if the frame cannot be used.
        """
        return check_frame(frame)

    @abstractmethod
    def reserve(self, slots: int) -> None:
        """Makes room for at least this many targets; slots keep their contents."""

    @abstractmethod
    def template(self, frame: np.ndarray, window: CropWindow, slot: int = 0) -> None:
        """Runs the template network on a window of ``frame`` and keeps its outputs in ``slot``."""

    @abstractmethod
    def search(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> np.ndarray:
        """Runs the search network for the targets in slots 0, 1, ... on one window of ``frame`` each.

        Returns float32 ``(len(windows), 5)``: cx, cy, w, h in units of the window's side, and score. It is a view that
        the next call overwrites.
        """

    @abstractmethod
    def move(self, source: int, to: int) -> None:
        """Copies the state in one slot over that in another."""

    def close(self) -> None:  # noqa: B027 - most backends hold nothing that Python does not release
        """Releases what the backend holds; it cannot be used afterwards."""


class HostBackend(Backend):
    """A backend that crops with OpenCV and whose networks read from and write to host arrays."""

    def __init__(self, manifest: Manifest, description: str) -> None:
        super().__init__(manifest, description)
        self._cropper = Cropper()
        self._as_bytes = manifest.input_format == UINT8_BGR
        self.template_image = np.zeros((1, *manifest.template.shape), manifest.template.dtype)
        self._search_images = np.zeros((0, *manifest.search.shape), manifest.search.dtype)
        # By side: buffers for crops that are not yet in the network's format.
        sides = (manifest.template_size, manifest.search_size)
        self._scratch = {side: np.zeros((side, side, 3), np.uint8) for side in sides}
        self._scale, self._offset = (values.reshape(3, 1, 1) for values in scale_and_offset(manifest))
        self._predictions = np.zeros((0, 5), np.float32)
        #: For each state tensor an array ``(capacity, ...)`` with a row per slot.
        self.state = {spec.name: np.zeros((0, *spec.shape), spec.dtype) for spec in manifest.state}

    def reserve(self, slots: int) -> None:
        """Makes room for at least this many targets. All arrays are replaced by larger ones."""
        if slots <= self.capacity:
            return
        self._search_images = np.zeros((slots, *self.manifest.search.shape), self.manifest.search.dtype)
        self._predictions = np.zeros((slots, 5), np.float32)
        for spec in self.manifest.state:
            grown = np.zeros((slots, *spec.shape), spec.dtype)
            grown[: self.capacity] = self.state[spec.name]
            self.state[spec.name] = grown
        self.capacity = slots

    def template(self, frame: np.ndarray, window: CropWindow, slot: int = 0) -> None:
        if not 0 <= slot < self.capacity:
            raise BackendError(f"there is no slot {slot}: reserve it first")
        self._crop(frame, window, self.template_image[0])
        self._run_template(slot)

    def search(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> np.ndarray:
        began = perf_counter()
        for i, window in enumerate(windows):
            self._crop(frame, window, self._search_images[i])
        cropped = perf_counter()
        self._run_searches(len(windows))
        self.seconds["crop"] += cropped - began
        self.seconds["infer"] += perf_counter() - cropped
        return self._predictions[: len(windows)]

    def move(self, source: int, to: int) -> None:
        for values in self.state.values():
            values[to] = values[source]

    def search_arrays(self, slots: slice) -> Dict[str, np.ndarray]:
        """The search network's inputs for some slots, by name: views of the arrays, which ``reserve`` replaces."""
        return {self.manifest.search.name: self._search_images[slots], **{n: v[slots] for n, v in self.state.items()}}

    def _crop(self, frame: np.ndarray, window: CropWindow, image: np.ndarray) -> None:
        """Crops a window into ``image``, in the format that the network takes."""
        crop = image if self._as_bytes else self._scratch[image.shape[2]]
        self._cropper.crop(frame, window, crop)
        if not self._as_bytes:  # BGR bytes (S, S, 3) to normalised RGB (3, S, S)
            np.multiply(crop[..., ::-1].transpose(2, 0, 1), self._scale, out=image)
            np.subtract(image, self._offset, out=image)

    @abstractmethod
    def _run_template(self, slot: int) -> None:
        """Runs the template network on ``template_image`` and writes ``state[...][slot]``."""

    @abstractmethod
    def _run_searches(self, count: int) -> None:
        """Runs the search network on slots 0 to ``count`` - 1 and writes their rows of ``_predictions``."""
