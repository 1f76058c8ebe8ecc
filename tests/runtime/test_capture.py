"""Readers: the newest frame of live sources, read-ahead for files, stalls and reconnects."""

from __future__ import annotations

import gc
import itertools
import threading
import tracemalloc
from time import monotonic, sleep
from typing import List, Optional
from unittest.mock import Mock

import numpy as np
import pytest

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import MultiTracker, State, Track
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.sources import LiveSource, Source
from asymtrack_edge.runtime.sources import reader as capture
from asymtrack_edge.runtime.sources.reader import Reader
from asymtrack_edge.runtime.sources.videos import _Stream
from tests.runtime.simulated import ColourBackend, FakeCapture

PATIENCE = 0.6


@pytest.fixture(autouse=True)
def eager(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "STALL_AFTER", 0.1)
    monkeypatch.setattr(capture, "RECONNECT_AFTER", (0.01, 0.05))


class Counted(Source):
    """Gives ``count`` numbered frames, of which frame 3 is unreadable, and counts requests; then may fail."""

    given, closed = 0, False

    def __init__(self, count: float, fails: bool = False) -> None:
        self.count, self.fails = count, fails

    def __iter__(self):
        while self.given < self.count:
            self.given += 1
            yield None if self.given == 4 else np.full((4, 4, 3), self.given - 1, np.uint8)
        if self.fails:
            raise OSError("disk gone")

    def close(self) -> None:
        self.closed = True


def test_slow_tracker_gets_fresh_frames_and_memory_stays_flat() -> None:
    """With a 60 Hz camera and a 20 Hz tracker, frames are younger than two periods and two of three are dropped."""
    period = 1 / 60
    reader = Reader(LiveSource("fake", lambda: FakeCapture(60, size=(640, 480))))
    ages, indices = [], []
    with reader:
        for _ in range(5):
            next(reader)
        gc.collect()
        tracemalloc.start()
        for _ in range(30):
            frame = next(reader)
            ages.append(frame.age)
            indices.append(frame.number)
            sleep(0.05)
        del frame
        _, peak = tracemalloc.get_traced_memory()
        tracemalloc.stop()
    # Three of thirty may be older, because other programs run on a test machine.
    assert sorted(ages)[-4] < 2 * period, f"oldest frames at decision {sorted(ages)[-4:]}"
    assert np.all(np.diff(indices) >= 1)
    assert reader.dropped >= 40 and reader.worst_age > 0
    assert reader.received - 35 - reader.dropped in (0, 1)  # one may still have been waiting
    assert peak < 5 * 640 * 480 * 3, f"{peak / 1e6:.1f} MB for frames of 0.9 MB"


def test_a_source_that_dies_is_reconnected() -> None:
    captures = FakeCapture(4, dies_after=3), FakeCapture(500, dies_after=4)  # the first lives longer than PATIENCE
    steps = [captures[0], SourceError("not yet"), captures[1], *[SourceError("nobody answers")] * 99]
    lines = []
    reader = Reader(LiveSource("camera 7", Mock(side_effect=steps)), PATIENCE, lines.append)
    with pytest.raises(SourceError, match=r"camera 7 has given no frame .*nobody answers"):
        list(reader)
    assert reader.received == 7 and reader.reconnects == 1
    assert any("went away" in line for line in lines) and any("back after" in line for line in lines)
    assert all(capture.released for capture in captures)
    reader.close()


def test_a_stall_is_reported_and_then_ends_the_run_although_the_read_hangs() -> None:
    lines = []
    camera = LiveSource("camera 7", lambda: FakeCapture(500, hangs_after=2, hang=1.5))
    reader, began = Reader(camera, PATIENCE, lines.append), monotonic()
    with pytest.raises(SourceError, match="no frame for"):
        list(reader)
    assert 0.5 < monotonic() - began < 1.4, "it waited for the hanging read"
    reader.close()
    assert len(lines) == reader.stalls == 1 and "no frame for 0.1" in lines[0]  # not that it reconnects


def test_ages_and_silence_do_not_follow_a_clock_that_jumps(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "time", itertools.cycle([5e8, 0.0, 2e9, 1e9, 3e9]).__next__)
    with Reader(LiveSource("fake", lambda: FakeCapture(200))) as reader:
        frames = [next(reader) for _ in range(5)]
    assert all(0 <= frame.age < 5 for frame in frames)
    assert all(b.received > a.received for a, b in zip(frames, frames[1:]))
    assert len({round(frame.time) for frame in frames}) > 1
    monkeypatch.setattr(capture, "monotonic", itertools.count(0, 99).__next__)  # as if this process was stopped
    with Reader(LiveSource("fake", lambda: FakeCapture(3)), patience=9) as reader:
        assert next(reader).number == 0


def test_closing_wakes_a_waiting_caller_and_ends_the_thread(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(capture, "atexit", Mock())
    reader = Reader(LiveSource("fake", lambda: FakeCapture(500, hangs_after=0, hang=0.5)))
    threading.Timer(0.1, reader.close, [0.0]).start()
    assert list(reader) == [] and reader._thread.is_alive()
    at_exit, *arguments = capture.atexit.register.call_args[0]
    at_exit(*arguments)
    assert not reader._thread.is_alive(), "Python must not end while the thread is in OpenCV"
    source = Counted(float("inf"))
    with Reader(source) as reader:
        next(reader)
    assert source.closed and list(reader) == []


def test_read_ahead_is_bounded_keeps_all_frames_in_order_and_passes_errors_on() -> None:
    source = Counted(40, fails=True)
    reader = Reader(source)
    frames = [next(reader)]
    sleep(0.05)
    assert source.given <= 1 + capture.READ_AHEAD + 1
    with pytest.raises(OSError, match="disk gone"):
        frames.extend(reader)
    assert [f.number for f in frames] == list(range(40))
    assert [f.image[0, 0, 0] for f in frames if f.image is not None] == [i for i in range(40) if i != 3]
    assert reader.dropped == 0 and source.closed


def test_a_run_counts_lost_frames_and_cannot_be_used_after_its_end() -> None:
    camera = FakeCapture(100)
    unreadable, real = [True], camera.retrieve
    camera.retrieve = lambda: (False, None) if unreadable and unreadable.pop() else real()
    for source in (Counted(2), LiveSource("fake", lambda: camera)):
        run = Run(MultiTracker(ColourBackend()), Reader(source))
        run.first_frame()  # the first readable frame of a camera
        sleep(0.2)
        run.start([])
        assert (run.latest.latency > 0.15) == source.live
        run._run_calls = Mock(wraps=run._run_calls)
        run.submit(lambda run=run: run.pause(False))
        threading.Timer(0.1, run.end).start()
        run.linger()
        assert run._run_calls.call_count < 5, "a run that is resumed at its end must not keep a core busy"
    box = Box(1, 1, 9, 9)
    run._hand_over(run.latest.frame, {0: Track(box, 0.9, State.TRACKING), 1: Track(box, 0.1, State.LOST)}, 0.0)
    assert run.summary()["lost"] == 1
    run.close()
    assert camera.released
    with pytest.raises(UsageError, match="has ended"):
        run.submit(run.summary).result(1)


@pytest.mark.parametrize(
    ("shown", "recording"),
    [([1, 2, 3], True), ([1, 2, 1], True), ([1, 2, None], True), ([1, 1, 1], False), ([0, 0, 0], False), ([], False)],
)
def test_a_stream_that_repeats_its_frames_is_a_recording_unless_nothing_moves(
    shown: List[Optional[int]], recording: bool
) -> None:
    new = itertools.count(9)  # in the place of 0

    def connect() -> FakeCapture:
        capture, values = FakeCapture(500, dies_after=len(shown)), iter([next(new) if v == 0 else v for v in shown])
        capture.retrieve = lambda: (True, None if (v := next(values)) is None else np.full((4, 4, 3), v, np.uint8))
        return capture

    stream = _Stream("rtsp://x", connect)
    for _ in range(3):
        while stream.read():
            pass
        stream.reconnect()
    assert stream.ended is recording
