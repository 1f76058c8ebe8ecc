"""Backends whose crops are made by OpenCV in host memory."""

from __future__ import annotations

from abc import abstractmethod
from time import perf_counter
from typing import Dict, Sequence

import numpy as np

from asymtrack_edge.errors import BackendError
from asymtrack_edge.geometry import Cropper, CropWindow
from asymtrack_edge.manifest import UINT8_BGR, Manifest
from asymtrack_edge.runtime.backends.base import Backend


class HostBackend(Backend):
    """A backend that crops into host arrays, from which and into which its networks compute."""

    def __init__(self, manifest: Manifest, description: str) -> None:
        super().__init__(manifest, description)
        self._cropper = Cropper()
        self._as_bytes = manifest.input_format == UINT8_BGR
        z, x = manifest.template_size, manifest.search_size
        self._template_image = np.zeros((1, *manifest.template.shape), manifest.template.dtype)
        self._search_images = np.zeros((0, *manifest.search.shape), manifest.search.dtype)
        # Where the crop is not what the network takes, it is made here first.
        self._template_crop = np.zeros((z, z, 3), np.uint8)
        self._search_crop = np.zeros((x, x, 3), np.uint8)
        std = 255.0 * np.asarray(manifest.std, np.float32)
        self._scale = (1 / std).reshape(3, 1, 1)
        self._offset = (255.0 * np.asarray(manifest.mean, np.float32) / std).reshape(3, 1, 1)
        self._predictions = np.zeros((0, 5), np.float32)
        #: Per state tensor an array ``(capacity, ...)``, slot by slot.
        self.state: Dict[str, np.ndarray] = {}

    def reserve(self, slots: int) -> None:
        """Makes room for at least this many targets. All arrays are replaced by larger ones."""
        if slots <= self.capacity:
            return
        self._search_images = np.zeros((slots, *self.manifest.search.shape), self.manifest.search.dtype)
        self._predictions = np.zeros((slots, 5), np.float32)
        for spec in self.manifest.state:
            grown = np.zeros((slots, *spec.shape), spec.dtype)
            if self.capacity:
                grown[: self.capacity] = self.state[spec.name]
            self.state[spec.name] = grown
        self.capacity = slots

    def template(self, frame: np.ndarray, window: CropWindow, slot: int = 0) -> None:
        """Crops, runs the template network and leaves its outputs in ``state[...][slot]``."""
        if not 0 <= slot < self.capacity:
            raise BackendError(f"there is no slot {slot}: reserve it first")
        self._crop(frame, window, self._template_crop, self._template_image[0])
        self._run_template(slot)

    def search(self, frame: np.ndarray, windows: Sequence[CropWindow]) -> np.ndarray:
        """Crops, runs the search network and returns a view of the predictions."""
        began = perf_counter()
        for i, window in enumerate(windows):
            self._crop(frame, window, self._search_crop, self._search_images[i])
        cropped = perf_counter()
        self._run_searches(len(windows))
        self.seconds["crop"] += cropped - began
        self.seconds["infer"] += perf_counter() - cropped
        return self._predictions[: len(windows)]

    def move(self, source: int, target: int) -> None:
        """Copies one slot's rows of ``state`` over another's."""
        for values in self.state.values():
            values[target] = values[source]

    def last_inputs(self) -> Dict[str, Dict[str, np.ndarray]]:
        """What the networks were given last (in slot 0), by network and input."""
        manifest = self.manifest
        return {
            "template": {manifest.template.name: self._template_image},
            "search": {manifest.search.name: self._search_images[:1], **{n: v[:1] for n, v in self.state.items()}},
        }

    def _crop(self, frame: np.ndarray, window: CropWindow, crop: np.ndarray, image: np.ndarray) -> None:
        """Writes a window into ``image`` as the network takes it; ``crop`` is scratch memory."""
        if self._as_bytes:
            self._cropper.crop(frame, window, image)
            return
        self._cropper.crop(frame, window, crop)
        # BGR bytes (S, S, 3) to normalised RGB (3, S, S).
        np.multiply(crop[..., ::-1].transpose(2, 0, 1), self._scale, out=image, casting="same_kind")
        np.subtract(image, self._offset, out=image, casting="same_kind")

    @abstractmethod
    def _run_template(self, slot: int) -> None:
        """Runs the template network on ``_template_image`` and writes ``state[...][slot]``."""

    @abstractmethod
    def _run_searches(self, count: int) -> None:
        """Runs the search network on slots 0 to ``count`` - 1 and writes their rows of ``_predictions``."""
