"""One target from frame to frame: where to search next, what to make of the prediction, and how a lost one is found.

A target that is not lost is followed exactly as published, and so is a lost one for a while: often it
comes back into the published crop by itself. Only then do some frames look elsewhere: where the target
was last seen well, around there in a wider window, and over the whole frame, nearest places first.
What is found there is followed beside the published track, and replaces it only when it has scored
well for several frames while the published crop has not. In no state is more than one crop searched
per frame, so recovery costs no time.
"""

from __future__ import annotations

import enum
import math
from dataclasses import dataclass
from typing import List, NamedTuple, Optional, Sequence

from asymtrack_edge.errors import UsageError
from asymtrack_edge.geometry import Box, CropWindow, box_from_crop, clip_box, crop_window

#: Side of the wider windows over that of the ordinary one.
WIDEN = 1.6
#: Distance of the windows of the search over the whole frame, over their side.
GRID_STEP = 0.6
#: A frame that would need more of them gets larger ones.
MOST_WINDOWS = 64
#: A candidate's area is at most this many times the lost target's, or its inverse.
SIZE_CHANGE = 4.0


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
        scores = 0 <= self.lost_below <= self.found_above <= 1 and 0 < self.smoothing <= 1
        if not scores or self.patience < 0 or self.confirm < 1:
            need = "0 <= lost_below <= found_above <= 1, 0 < smoothing <= 1, patience >= 0, confirm >= 1"
            raise UsageError(f"settings need {need}: not {self}")


class Target:
    """Box and state of one target, followed as in the reference and, with ``recover``, looked for while it is lost.

    ``id`` is its owner's name for it, ``factor`` the search window's side over ``sqrt(w * h)``.
    While the target is looked for, ``box`` stays that of the published track.
    """

    def __init__(self, id: int, box: Box, settings: TrackerSettings, factor: float, recover: bool = True) -> None:
        self.id = id
        self.box = self._trusted = box
        self.state = State.TRACKING
        self._settings = settings
        self._factor = factor
        self._patience = settings.patience if recover else math.inf
        self._smoothed = self._score = 1.0
        self._candidate: Optional[Box] = None
        self._hits = self._lost_for = self._turn = self._looks = 0
        self._elsewhere = False
        self._grid: List[CropWindow] = []
        self._grid_for: Sequence[int] = ()

    def window(self, frame_shape: Sequence[int]) -> CropWindow:
        """Where to search in a frame of ``frame_shape`` (H, W, ...).

        It is the published crop, or another one in every second frame while the target is lost for long.
        """
        # A place whose own score recovers is not left. Else every second frame looks elsewhere, or two of three
        # while there is a candidate.
        due = self._looks < (2 if self._candidate is not None else 1)
        missed = self.state is State.LOST and self._lost_for >= self._patience
        self._elsewhere = due and missed and self._score < self._settings.found_above
        if not self._elsewhere:
            self._looks = 0
            return crop_window(self.box, self._factor)
        self._looks += 1
        if self._candidate is not None:
            return crop_window(self._candidate, self._factor)
        turn, self._turn = self._turn, self._turn + 1
        if turn % 2 == 0:
            return crop_window(self._trusted, self._factor * (1 if turn % 4 == 0 else WIDEN))
        if self._grid_for != tuple(frame_shape[:2]):
            self._grid_for = tuple(frame_shape[:2])
            self._grid = search_grid(self._trusted, frame_shape, self._factor * WIDEN)
        return self._grid[turn // 2 % len(self._grid)]

    def advance(self, prediction: Sequence[float], window: CropWindow, frame_shape: Sequence[int]) -> Track:
        """Takes the search network's prediction for ``window()``: cx, cy, w, h over its side, and score."""
        box, score = None, 0.0
        # An fp16 engine may overflow: its prediction then says nothing, and the box stays.
        if all(map(math.isfinite, prediction)):
            box, score = clip_box(box_from_crop(prediction, window), frame_shape), float(prediction[4])
        self._lost_for += 1
        if self._elsewhere:
            self._weigh(box, score)
        else:
            self._follow(box, score)
        if self.state is State.TRACKING:
            self._lost_for = self._turn = 0
            self._grid_for = ()
        return Track(self.box, self._score, self.state)

    def _follow(self, box: Optional[Box], score: float) -> None:
        """Takes what was found in the published crop."""
        settings = self._settings
        self.box, self._score = box or self.box, score
        self._smoothed += settings.smoothing * (score - self._smoothed)
        if self.state is State.TRACKING and self._smoothed < settings.lost_below:
            self.state = State.LOST
        elif self.state is State.LOST and self._smoothed > settings.found_above:
            self.state = State.TRACKING
        if score >= settings.found_above:
            self._candidate, self._hits = None, 0
            if self.state is State.TRACKING:
                self._trusted = self.box

    def _weigh(self, box: Optional[Box], score: float) -> None:
        """Weighs what was found elsewhere."""
        if box is not None:
            change = box.w * box.h / (self._trusted.w * self._trusted.h)
            likely = score >= self._settings.found_above and 1 / SIZE_CHANGE <= change <= SIZE_CHANGE
            box = box if likely else None
        self._candidate, self._hits = box, 0 if box is None else self._hits + 1
        if box is not None and self._hits >= self._settings.confirm:
            self.box = self._trusted = box
            self._smoothed = self._score = score
            self.state = State.TRACKING
            self._candidate, self._hits = None, 0


def search_grid(box: Box, frame_shape: Sequence[int], factor: float) -> List[CropWindow]:
    """Windows as large as the search window of ``box`` that cover a frame, nearest first; larger if too many."""
    height, width = frame_shape[:2]
    side = crop_window(box, factor).side
    while True:
        across = max(1, math.ceil(width / (GRID_STEP * side)))
        down = max(1, math.ceil(height / (GRID_STEP * side)))
        if across * down <= MOST_WINDOWS:
            break
        side = math.ceil(side * 1.1)
    x, y = box.centre
    columns = [(i + 0.5) * width / across for i in range(across)]
    rows = [(j + 0.5) * height / down for j in range(down)]
    centres = sorted(((cx, cy) for cx in columns for cy in rows), key=lambda c: math.hypot(c[0] - x, c[1] - y))
    return [CropWindow(round(cx - side * 0.5), round(cy - side * 0.5), side, (cx, cy)) for cx, cy in centres]
