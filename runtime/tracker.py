"""Following one target."""

from __future__ import annotations

from pathlib import Path
from time import perf_counter
from typing import Dict, Optional, Sequence, Union

import numpy as np

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import check_box, crop_window
from asymtrack_edge.runtime.backends.base import Backend
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.recovery import default_settings, new_target
from asymtrack_edge.runtime.target import State, Target, Track, TrackerSettings

__all__ = ["State", "Track", "Tracker", "TrackerSettings"]


class Tracker:
    """Follows one target from frame to frame.

    Example::

        tracker = Tracker.load("T")
        tracker.init(frame, (x, y, w, h))
        track = tracker.update(next_frame)

    Args:
        engine: where the networks run.
        settings: when a target counts as lost.
    """

    def __init__(self, engine: Backend, settings: Optional[TrackerSettings] = None) -> None:
        self.engine = engine
        self.settings = settings or TrackerSettings()
        self._target: Optional[Target] = None
        self._decode_seconds = 0.0

    @classmethod
    def load(
        cls,
        model: Union[str, Path] = "T",
        backend: str = "auto",
        device: int = 0,
        threads: Optional[int] = None,
        settings: Optional[TrackerSettings] = None,
    ) -> Tracker:
        """Opens bundled weights or an export directory.

        Args:
            model: ``"T"``, ``"S"``, ``"B"`` for the weights that come with the package, or a directory
                written by ``asymtrack-export``.
            backend: ``"auto"``, or one of ``asymtrack_edge.runtime.BACKENDS``.
            device: index of the GPU, for backends that use one.
            threads: CPU threads of one network; None for the runtime's default.
            settings: when a target counts as lost, and what is done about it. By default bundled
                weights look for a lost target; an export directory tracks exactly as published, as
                does ``TrackerSettings()``.

        Raises:
            ManifestError: the directory is incomplete or altered.
            BackendError: the backend is not available here.
        """
        return cls(open_backend(model, backend, device, threads), settings or default_settings(model))

    @property
    def seconds(self) -> Dict[str, float]:
        """Time spent in ``update`` so far, by stage: crop, infer, decode."""
        return {**self.engine.seconds, "decode": self._decode_seconds}

    def init(self, frame: np.ndarray, box: Sequence[float]) -> None:
        """Chooses the target; may be called again at any time, for the same or another target.

        Args:
            frame: BGR uint8 ``(H, W, 3)``.
            box: x, y, w, h in pixels.

        Raises:
            FrameError: not such a frame.
            BoxError: the box cannot be a target in it.
        """
        checked = check_box(box, self.engine.check_frame(frame))
        window = crop_window(checked, self.engine.manifest.template_factor)
        self.engine.template(frame, window)
        self._target = new_target(checked, self.settings, self.engine.manifest.search_factor)

    def update(self, frame: np.ndarray) -> Track:
        """Finds the target in the next frame.

        Args:
            frame: BGR uint8 ``(H, W, 3)``; its size may change between frames.

        Raises:
            FrameError: not such a frame; the tracker stays as it was and can go on with the next.
            UsageError: there is no target yet.
        """
        target = self._target
        if target is None:
            raise UsageError("there is no target: call init(frame, box) before update(frame)")
        shape = self.engine.check_frame(frame)
        window = target.window(shape)
        prediction = self.engine.search(frame, (window,))[0]
        began = perf_counter()
        track = target.advance(prediction, window, shape)
        self._decode_seconds += perf_counter() - began
        return track

    def close(self) -> None:
        """Gives back the engine's memory; the tracker cannot be used afterwards."""
        self.engine.close()
