"""The tracker with a backend that returns scripted predictions, and with the bundled weights."""

from __future__ import annotations

import math
import tracemalloc
from typing import Any, Sequence
from unittest.mock import Mock

import numpy as np
import pytest

from asymtrack_edge.errors import BoxError, UsageError
from asymtrack_edge.runtime import MultiTracker, State, Track, Tracker, TrackerSettings
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.runtime.simulated import ColourBackend

FRAME = np.zeros((240, 320, 3), np.uint8)


def scripted(predictions: Sequence[Sequence[float]]) -> Any:
    """A backend that returns these predictions."""
    backend: Any = ColourBackend()
    backend.reserve(1)
    backend.search = Mock(side_effect=[np.array([prediction], np.float32) for prediction in predictions])
    return backend


def test_lost_and_found_with_hysteresis() -> None:
    scores = [0.9, 0.0, 0.9, 0.0, 0.0, 0.0, 0.0, 0.0, 0.45, 0.45, 0.9, 0.9, 0.9]
    engine = scripted([(0.5, 0.5, 0.25, 0.25, score) for score in scores])
    tracker = Tracker(engine, settings=TrackerSettings(lost_below=0.3, found_above=0.5, smoothing=0.5))
    tracker.init(FRAME, (100, 80, 40, 40))
    states = [tracker.update(FRAME).state for _ in scores]
    # One bad frame does not lose the target; medium scores do not bring it back; good scores do.
    assert states[:3] == [State.TRACKING] * 3
    assert states[6:10] == ["lost"] * 4 and f"{states[6]}" == "lost"  # in every version of Python
    assert states[-1] is State.TRACKING
    assert sum(a is not b for a, b in zip(states, states[1:])) == 2


@pytest.mark.parametrize("nonsense", [(np.nan, 0.5, np.inf, 0.25, np.nan), (0.5, 0.5, 0.25, 0.25, np.nan)])
@pytest.mark.parametrize("recover", [False, True])
def test_a_prediction_of_nan_counts_as_one_bad_frame(recover: bool, nonsense: Any) -> None:
    answers = [(0.5, 0.5, 0.25, 0.25, 0.9), nonsense, (0.5, 0.5, 0.25, 0.25, 0.9), *[nonsense] * 12]
    tracker = Tracker(scripted(answers), recover)
    tracker.init(FRAME, (100, 80, 40, 40))
    tracks = [tracker.update(FRAME) for _ in answers]
    assert tracks[1] == Track(tracks[0].box, 0.0, State.TRACKING)
    assert tracks[2].score == pytest.approx(0.9)
    assert tracks[-1].state is State.LOST and np.isfinite(tracks[-1].box).all() and tracks[-1].score == 0


def test_misuse_is_refused() -> None:
    tracker = Tracker(scripted([]))
    with pytest.raises(UsageError, match="init"):
        tracker.update(FRAME)
    with pytest.raises(BoxError):
        tracker.init(FRAME, (400, 10, 20, 20))
    for kind in (Tracker, MultiTracker):
        with pytest.raises(UsageError, match=rf"{kind.__name__}\.load\('T'\)"):
            kind("T")
    low, high = {"lost_below": -1, "smoothing": 0, "patience": -1, "confirm": 0}, {"found_above": 1.5, "smoothing": 1.5}
    for name, value in (*low.items(), *high.items(), ("lost_below", 0.7), ("confirm", math.nan)):
        with pytest.raises(UsageError):
            TrackerSettings(**{name: value})


def test_update_allocates_almost_no_memory() -> None:
    frames = [frame for frame, _ in synthetic_clip(frames=12)]
    tracker = Tracker.load("T", threads=1)
    box = (150, 110, 50, 45)
    tracker.init(frames[0], box)
    for frame in frames[1:]:
        tracker.update(frame)
    # The same windows once more, because scratch memory may grow for larger ones.
    tracker.init(frames[0], box)
    tracemalloc.start()
    try:
        tracker.update(frames[1])
        tracemalloc.reset_peak()
        before = tracemalloc.get_traced_memory()[0]
        for frame in frames[2:]:
            tracker.update(frame)
        peak = tracemalloc.get_traced_memory()[1] - before
    finally:
        tracemalloc.stop()
    # A 256x256 crop alone would be 196,608 bytes.
    assert peak < 20_000 and tracker.seconds["box"] > 0


def test_a_closed_tracker_says_so_and_a_dropped_one_closes_its_backend(monkeypatch: pytest.MonkeyPatch) -> None:
    with Tracker(scripted([])) as tracker, MultiTracker(scripted([])) as many:
        tracker.init(FRAME, (100, 80, 40, 40))
        number = many.add(FRAME, (100, 80, 40, 40))
    tracker.close()
    assert len(many) == 0 and number not in many
    for call in (tracker.update, many.update, lambda frame: tracker.init(frame, (1, 2, 30, 40))):
        with pytest.raises(UsageError, match="closed: load another"):
            call(FRAME)
    engine = scripted([])
    engine.close, engine.reserve = Mock(), Mock(side_effect=[None, MemoryError])
    monkeypatch.setattr("asymtrack_edge.runtime.tracker.open_backend", lambda *_: engine)
    dropped = Tracker.load("T")
    assert engine.close.call_count == 0
    del dropped
    assert engine.close.call_count == 1
    with pytest.raises(MemoryError):
        Tracker.load("T")
    Tracker(engine).close()
    assert engine.close.call_count == 3
