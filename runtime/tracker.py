"""Following one target."""

from __future__ import annotations

import enum
from dataclasses import dataclass
from pathlib import Path
from time import perf_counter
from typing import Dict, NamedTuple, Optional, Sequence, Union

import numpy as np

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import Box, box_from_crop, check_box, check_frame, clip_box, crop_window
from asymtrack_edge.runtime.engine import Engine
from asymtrack_edge.runtime.loading import open_engine


class State(enum.Enum):
    """Whether the tracker believes that its box shows the target."""

    TRACKING = "tracking"
    LOST = "lost"


class Track(NamedTuple):
    """The answer for one frame.

    Attributes:
        box: in frame pixels.
        score: 0..1, how sharply the target is located in this frame.
        state: what the scores of this and recent frames say together.
    """

    box: Box
    score: float
    state: State


@dataclass(frozen=True)
class TrackerSettings:
    """When a target counts as lost, and as found again (hysteresis).

    Attributes:
        lost_below: the smoothed score below which the target is lost.
        found_above: the smoothed score above which it is found again.
        smoothing: weight of the newest score in the smoothed one, 0..1.
    """

    lost_below: float = 0.25
    found_above: float = 0.4
    smoothing: float = 0.3

    def __post_init__(self) -> None:
        if not 0 <= self.lost_below <= self.found_above <= 1:
            raise UsageError("settings need 0 <= lost_below <= found_above <= 1")
        if not 0 < self.smoothing <= 1:
            raise UsageError("smoothing lies in (0, 1]")


class Target:
    """Box and state of one target, as ``Tracker`` and ``MultiTracker`` keep them."""

    def __init__(self, box: Box, settings: TrackerSettings) -> None:
        self.box = box
        self.settings = settings
        self.smoothed = 1.0
        self.state = State.TRACKING

    def advance(self, box: Box, score: float) -> Track:
        """Takes the prediction of the next frame."""
        settings = self.settings
        self.box = box
        self.smoothed += settings.smoothing * (score - self.smoothed)
        if self.state is State.TRACKING and self.smoothed < settings.lost_below:
            self.state = State.LOST
        elif self.state is State.LOST and self.smoothed > settings.found_above:
            self.state = State.TRACKING
        return Track(box, score, self.state)


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

    def __init__(self, engine: Engine, settings: Optional[TrackerSettings] = None) -> None:
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
            settings: when a target counts as lost.

        Raises:
            ManifestError: the directory is incomplete or altered.
            EngineError: the backend is not available here.
        """
        return cls(open_engine(model, backend, device, threads), settings)

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
        checked = check_box(box, check_frame(frame).shape)
        window = crop_window(checked, self.engine.manifest.template_factor)
        self.engine.template(frame, window)
        self._target = Target(checked, self.settings)

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
        check_frame(frame)
        window = crop_window(target.box, self.engine.manifest.search_factor)
        prediction = self.engine.search(frame, (window,))[0]
        began = perf_counter()
        box = clip_box(box_from_crop(prediction, window), frame.shape)
        track = target.advance(box, float(prediction[4]))
        self._decode_seconds += perf_counter() - began
        return track

    def close(self) -> None:
        """Gives back the engine's memory; the tracker cannot be used afterwards."""
        self.engine.close()
