"""Lost and found: a target that comes back is found again."""

from __future__ import annotations

from typing import Callable, List, Tuple

import numpy as np
from hypothesis import given
from hypothesis import strategies as st

from asymtrack_edge.geometry import Box, crop_window, iou
from asymtrack_edge.runtime import State, Track, Tracker, TrackerSettings
from asymtrack_edge.runtime.tracker import MOST_WINDOWS, Target, search_grid
from tests.runtime.simulated import ColourBackend

WAY_OUT = 12


def disappearing(frames: int, back_at: int, where: int, size: int = 24) -> List[np.ndarray]:
    """A red patch that rests, is gone from frame ``WAY_OUT`` on and comes back elsewhere."""
    made = []
    for i in range(frames):
        frame = np.full((240, 320, 3), 60, np.uint8)
        if i < WAY_OUT:
            frame[100:124, 40:64] = (0, 0, 255)
        elif i >= back_at:
            frame[100 : 100 + size, where : where + size] = (0, 0, 255)
        made.append(frame)
    return made


def follow(frames: List[np.ndarray], **options: bool) -> List[Track]:
    backend = ColourBackend()
    backend.reserve(1)
    tracker = Tracker(backend, **options)
    tracker.init(frames[0], (40, 100, 24, 24))
    tracks = [tracker.update(frame) for frame in frames[1:]]
    assert backend.calls == [1] * len(tracks)
    return tracks


def test_target_that_comes_back_far_away_is_found_with_one_crop_a_frame() -> None:
    frames = disappearing(90, 40, 250)
    without, found = follow(frames, recover=False), follow(frames)
    assert without[-1].state is State.LOST and iou(without[-1].box, (250, 100, 24, 24)) == 0
    assert found[-1].state is State.TRACKING and iou(found[-1].box, (250, 100, 24, 24)) > 0.99
    # While it was lost the box was the published one, which has not moved here.
    lost = [track.box for track in found if track.state is State.LOST]
    assert lost and set(lost) == {Box(40, 100, 24, 24)}


def test_target_that_comes_back_where_it_went_is_found_at_once() -> None:
    found = follow(disappearing(60, 40, 40))
    again = next(i for i, t in enumerate(found) if i >= 40 and t.state is State.TRACKING)
    assert again <= 40 + 2 + TrackerSettings().confirm


def test_something_of_another_size_is_not_believed() -> None:
    assert follow(disappearing(120, 30, 200, size=100))[-1].state is State.LOST


def scripted(here: Callable[[int], float], frames: int, **settings: int) -> Tuple[List[Track], List[int]]:
    """Tracks where the published crop drifts and scores ``here(i)``, other places 0.95; frames that looked there."""
    target, shape = Target(0, Box(100, 80, 40, 40), TrackerSettings(**settings), 4.0), (480, 640)
    tracks, elsewhere = [], []
    for i in range(frames):
        window, prediction = target.window(shape), (0.51, 0.5, 0.25, 0.25, here(i))
        if window != crop_window(target.box, 4.0):
            elsewhere.append(i)
            prediction = (0.9, 0.5, 0.25, 0.25, 0.95)
        tracks.append(target.advance(prediction, window, shape))
    return tracks, elsewhere


def test_a_lost_target_is_waited_for_as_published_and_one_good_look_elsewhere_is_not_enough() -> None:
    tracks, elsewhere = scripted(lambda i: 0.1, 40, patience=10, confirm=5)
    lost = next(i for i, track in enumerate(tracks) if track.state is State.LOST)
    found = next(i for i, t in enumerate(tracks) if i > lost and t.state is State.TRACKING)
    assert elsewhere[0] == lost + 10 and elsewhere.index(found) == 5 - 1
    assert all(track.box.x < 160 for track in tracks[:found]) and tracks[found].box.x > 200


def test_a_place_whose_own_score_recovers_is_not_left() -> None:
    """What scores well elsewhere is dropped as soon as the published crop does."""
    tracks, elsewhere = scripted(lambda i: 0.1 if i < 20 else 0.9, 30, patience=10, confirm=8)
    assert elsewhere and max(elsewhere) <= 21
    assert tracks[-1].state is State.TRACKING and tracks[-1].box.x < 160


@given(st.integers(2, 4000), st.integers(2, 4000), st.floats(1, 600), st.floats(1, 600))
def test_grid_covers_the_frame_with_few_windows(width, height, w, h) -> None:
    grid = search_grid(Box(width / 3, height / 4, w, h), (height, width), 4.0)
    assert 1 <= len(grid) <= MOST_WINDOWS
    assert min(g.left for g in grid) <= 1 and max(g.left + g.side for g in grid) >= width - 1
    assert min(g.top for g in grid) <= 1 and max(g.top + g.side for g in grid) >= height - 1
    xs = sorted({g.centre[0] for g in grid})
    assert all(b - a <= grid[0].side for a, b in zip(xs, xs[1:]))
