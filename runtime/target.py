"""One target from frame to frame: where to search next, and what to make of the prediction."""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import NamedTuple, Sequence

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import Box, CropWindow, box_from_crop, clip_box, crop_window


class State(enum.Enum):
    """Whether the tracker believes that its box shows the target."""

    TRACKING = "tracking"
    LOST = "lost"


class Track(NamedTuple):
    """Where a target is in one frame.

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
    """When a target counts as lost and as found again, and how it is looked for in between.

    Attributes:
        lost_below: the smoothed score below which the target is lost.
        found_above: the smoothed score above which it is found again.
        smoothing: weight of the newest score in the smoothed one, 0..1.
        patience: frames that a lost target is followed as published before it is looked for elsewhere.
        confirm: looks in a row in which something found elsewhere must score above ``found_above``.
    """

    lost_below: float = 0.4
    found_above: float = 0.6
    smoothing: float = 0.3
    patience: int = 10
    confirm: int = 5

    def __post_init__(self) -> None:
        if not 0 <= self.lost_below <= self.found_above <= 1:
            raise UsageError("settings need 0 <= lost_below <= found_above <= 1")
        if not 0 < self.smoothing <= 1:
            raise UsageError("smoothing lies in (0, 1]")
        if self.patience < 0 or self.confirm < 1:
            raise UsageError("patience is at least 0, confirm at least 1")


class Target:
    """Box and state of one target; follows the reference to the letter.

    Args:
        box: in the frame it was chosen in.
        settings: when it counts as lost.
        factor: side of the search window over ``sqrt(w * h)``.
    """

    def __init__(self, box: Box, settings: TrackerSettings, factor: float) -> None:
        self.box = box
        self.settings = settings
        self.factor = factor
        self.smoothed = 1.0
        self.state = State.TRACKING

    def window(self, frame_shape: Sequence[int]) -> CropWindow:
        """Where to search in a frame of ``frame_shape`` (H, W, ...)."""
        return crop_window(self.box, self.factor)

    def advance(self, prediction: Sequence[float], window: CropWindow, frame_shape: Sequence[int]) -> Track:
        """Takes the search network's prediction for ``window``.

        Args:
            prediction: cx, cy, w, h in units of the window's side, and score.
            window: the one that ``window()`` gave for this frame.
            frame_shape: H, W, ... of the frame.
        """
        score = 0.0
        # An fp16 engine may overflow: its prediction then says nothing, and the box stays.
        if all(map(math.isfinite, prediction)):
            self.box = clip_box(box_from_crop(prediction, window), frame_shape)
            score = float(prediction[4])
        self._weigh(score)
        return Track(self.box, score, self.state)

    def _weigh(self, score: float) -> None:
        settings = self.settings
        self.smoothed += settings.smoothing * (score - self.smoothed)
        if self.state is State.TRACKING and self.smoothed < settings.lost_below:
            self.state = State.LOST
        elif self.state is State.LOST and self.smoothed > settings.found_above:
            self.state = State.TRACKING
