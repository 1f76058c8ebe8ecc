"""Recovery: a lost target that comes back is found again."""

from __future__ import annotations

from typing import Callable, Dict, List, Optional, Tuple

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymtrack_edge.geometry import Box, CropWindow, crop_window, iou
from asymtrack_edge.runtime import State, Track, Tracker, TrackerSettings
from asymtrack_edge.runtime.tracker import MOST_WINDOWS, WIDEN, Target, search_grid
from tests.runtime.simulated import ColourBackend

WAY_OUT = 12
SHAPE = (480, 640)


def disappearing(frames: int, back_at: int, where: int, size: int = 24) -> List[np.ndarray]:
    """Frames with a red patch that stands still, disappears at frame ``WAY_OUT`` and comes back elsewhere."""
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


def test_a_target_that_comes_back_far_away_is_found_with_one_crop_per_frame() -> None:
    frames = disappearing(90, 40, 250)
    without, found = follow(frames, recover=False), follow(frames)
    assert without[-1].state is State.LOST and iou(without[-1].box, (250, 100, 24, 24)) == 0
    assert found[-1].state is State.TRACKING and iou(found[-1].box, (250, 100, 24, 24)) > 0.99
    # While the target is lost, the box is that of the published tracker, which does not move here.
    lost = [track.box for track in found if track.state is State.LOST]
    assert lost and set(lost) == {Box(40, 100, 24, 24)}


@pytest.mark.parametrize("size", [10, 100])
def test_an_object_of_another_size_is_not_accepted(size: int) -> None:
    assert follow(disappearing(120, 30, 200, size=size))[-1].state is State.LOST


def make_target(**settings: int) -> Target:
    return Target(0, Box(100, 80, 40, 40), TrackerSettings(**settings), 4.0)


def scripted(
    target: Target, here: Callable[[int], float], frames: int, there: Optional[Callable[[int], float]] = None
) -> Tuple[List[Track], Dict[int, CropWindow]]:
    """Tracks with a drifting published crop of score ``here(i)`` and the n-th crop elsewhere of score ``there(n)``.

    Returns the tracks, and the windows of the crops elsewhere by frame.
    """
    tracks, looks = [], {}
    for i in range(frames):
        window, prediction = target.window(SHAPE), (0.51, 0.5, 0.25, 0.25, here(i))
        if window != crop_window(target.box, 4.0):
            looks[i] = window
            prediction = (0.9, 0.5, 0.25, 0.25, there(len(looks)) if there else 0.95)
        tracks.append(target.advance(prediction, window, SHAPE))
    return tracks, looks


def test_the_search_alternates_between_the_last_sure_place_its_surroundings_and_a_grid() -> None:
    """One good score while it is lost does not make a place sure; once found elsewhere, the search starts there."""
    target = make_target(patience=2)
    for box, once in ((target.box, 99), (Box(400, 300, 40, 40), 7)):
        target.box = box
        scripted(target, lambda i: 0.9, 20)
        grid, near = search_grid(target.box, SHAPE, 4.0 * WIDEN), crop_window(target.box, 4.0)
        tracks, looks = scripted(target, lambda i: 0.9 if i == once else 0.1, 19, lambda n: 0.1)  # noqa: B023
        around = crop_window(target._last_sure, 4.0 * WIDEN)
        assert list(looks.values())[:6] == [near, grid[0], around, grid[1], near, grid[2]]
        assert tracks[-1].state is State.LOST


@pytest.mark.parametrize("worse", [0.1, np.nan])
def test_good_scores_elsewhere_must_be_consecutive(worse: float) -> None:
    tracks, looks = scripted(make_target(patience=2, confirm=3), lambda i: 0.1, 60, lambda n: 0.95 if n % 3 else worse)
    assert len(looks) > 20 and all(track.state is State.LOST for track in tracks[5:])


def test_the_search_elsewhere_waits_for_patience_and_needs_several_good_scores() -> None:
    tracks, looks = scripted(make_target(patience=10, confirm=5), lambda i: 0.1, 40)
    elsewhere = list(looks)
    lost = next(i for i, track in enumerate(tracks) if track.state is State.LOST)
    found = next(i for i, t in enumerate(tracks) if i > lost and t.state is State.TRACKING)
    assert elsewhere[0] == lost + 10 and elsewhere.index(found) == 5 - 1
    assert [i - elsewhere[0] for i in elsewhere[:5]] == [0, 1, 3, 4, 6]
    assert all(track.box.x < 160 for track in tracks[:found])
    assert tracks[found].box.x > 200 and tracks[found].score == 0.95
    # One good score of the published crop restarts the count of good scores elsewhere.
    tracks, looks = scripted(make_target(patience=10, confirm=5), lambda i: 0.9 if i == elsewhere[1] + 1 else 0.1, 60)
    again = next(i for i, t in enumerate(tracks) if i > elsewhere[1] + 1 and t.state is State.TRACKING)
    assert sum(elsewhere[1] + 1 < i <= again for i in looks) == 5
    # The smoothed score decides when the target counts as found again.
    tracks, _ = scripted(make_target(patience=30), lambda i: 0.1 if i < 20 else 0.9, 30)
    assert tracks[20].state is State.LOST and tracks[22].state is State.TRACKING


def test_the_published_place_is_kept_if_its_own_score_recovers() -> None:
    """Then good scores elsewhere are dropped."""
    tracks, looks = scripted(make_target(patience=10, confirm=8), lambda i: 0.1 if i < 20 else 0.9, 30)
    assert looks and max(looks) <= 21
    assert tracks[-1].state is State.TRACKING and tracks[-1].box.x < 160


@settings(deadline=None)
@given(st.integers(2, 4000), st.integers(2, 4000), st.floats(1, 600), st.floats(1, 600))
def test_grid_covers_the_frame_with_few_windows(width, height, w, h) -> None:
    grid = search_grid(Box(width / 3, height / 4, w, h), (height, width), 4.0)
    assert 1 <= len(grid) <= MOST_WINDOWS
    assert min(g.left for g in grid) <= 1 and max(g.left + g.side for g in grid) >= width - 1
    assert min(g.top for g in grid) <= 1 and max(g.top + g.side for g in grid) >= height - 1
    xs = sorted({g.centre[0] for g in grid})
    assert all(b - a <= grid[0].side for a, b in zip(xs, xs[1:]))
