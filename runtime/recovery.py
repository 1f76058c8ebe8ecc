"""Finding a lost target again.

While a target is lost its box rests where it was last seen well, and each frame's one search looks
at another place in turn: there, around there in a wider window, and somewhere in the frame, nearest
places first. Where the score is high enough a candidate is followed for a few frames before it is
believed. A target that is not lost is followed exactly as without all this, and in no state is more
than one crop searched per frame, so recovery costs no time.
"""

from __future__ import annotations

import math
from typing import List, Optional, Sequence

from asymtrack_edge.geometry import Box, CropWindow, box_from_crop, clip_box, crop_window
from asymtrack_edge.runtime.target import State, Target, Track, TrackerSettings


class RecoveringTarget(Target):
    """A target that is looked for while it is lost; see ``Target`` for the arguments."""

    def __init__(self, box: Box, settings: TrackerSettings, factor: float) -> None:
        super().__init__(box, settings, factor)
        self.trusted = box
        self.candidate: Optional[Box] = None
        self.hits = 0
        self._turn = 0
        self._grid: List[CropWindow] = []
        self._grid_for: Sequence[int] = ()

    def window(self, frame_shape: Sequence[int]) -> CropWindow:
        """See ``Target.window``."""
        if self.state is State.TRACKING:
            return super().window(frame_shape)
        if self.candidate is not None:
            return crop_window(self.candidate, self.factor)
        turn, self._turn = self._turn, self._turn + 1
        if turn % 3 == 0:
            return crop_window(self.trusted, self.factor)
        if turn % 3 == 1:
            return crop_window(self.trusted, self.factor * self.settings.widen)
        if self._grid_for != tuple(frame_shape[:2]):
            self._grid_for = tuple(frame_shape[:2])
            self._grid = search_grid(self.trusted, frame_shape, self.factor, self.settings)
        return self._grid[turn // 3 % len(self._grid)]

    def advance(self, prediction: Sequence[float], window: CropWindow, frame_shape: Sequence[int]) -> Track:
        """See ``Target.advance``. While lost, the box is where the target was last seen well."""
        if self.state is State.TRACKING:
            track = super().advance(prediction, window, frame_shape)
            if track.score >= self.settings.found_above:
                self.trusted = track.box
            if self.state is State.LOST:
                self._begin_search()
                return Track(self.trusted, track.score, self.state)
            return track
        if not all(map(math.isfinite, prediction)):
            self.candidate, self.hits = None, 0
            return Track(self.box, 0.0, self.state)
        box = clip_box(box_from_crop(prediction, window), frame_shape)
        score = float(prediction[4])
        if score < self.settings.found_above or not self._plausible(box):
            self.candidate, self.hits = None, 0
        else:
            self.candidate, self.hits = box, self.hits + 1
            if self.hits >= self.settings.confirm:
                self._found(box, score)
        return Track(self.box, score, self.state)

    def _begin_search(self) -> None:
        self.box = self.trusted
        self.candidate, self.hits, self._turn, self._grid_for = None, 0, 0, ()

    def _found(self, box: Box, score: float) -> None:
        self.box = self.trusted = box
        self.candidate = None
        self.smoothed = score
        self.state = State.TRACKING

    def _plausible(self, box: Box) -> bool:
        change = box.w * box.h / (self.trusted.w * self.trusted.h)
        return 1 / self.settings.size_change <= change <= self.settings.size_change


def search_grid(box: Box, frame_shape: Sequence[int], factor: float, settings: TrackerSettings) -> List[CropWindow]:
    """Windows that cover a frame, those nearest to ``box`` first.

    They are as large as the search window of ``box``; larger if there would be too many.
    """
    height, width = frame_shape[:2]
    side = crop_window(box, factor).side
    while True:
        across = max(1, math.ceil(width / (settings.grid_step * side)))
        down = max(1, math.ceil(height / (settings.grid_step * side)))
        if across * down <= settings.most_windows:
            break
        side = math.ceil(side * 1.1)
    x, y = box.centre
    columns = [(i + 0.5) * width / across for i in range(across)]
    rows = [(j + 0.5) * height / down for j in range(down)]
    centres = [(column, row) for column in columns for row in rows]
    centres.sort(key=lambda c: math.hypot(c[0] - x, c[1] - y))
    return [CropWindow(round(cx - side * 0.5), round(cy - side * 0.5), side, (cx, cy)) for cx, cy in centres]
