"""Several targets in one call: each is tracked as if alone, and may be added and removed at any time."""

from __future__ import annotations

import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any, Dict

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymtrack_edge.errors import BackendError, BoxError, FrameError, UsageError
from asymtrack_edge.geometry import Box, crop_window, iou
from asymtrack_edge.runtime import MultiTracker, Tracker
from asymtrack_edge.runtime.sources.clip import default_clip
from tests.runtime.simulated import ColourBackend, check_several, coloured_patches

FRAMES = list(coloured_patches(40, 5))


@settings(deadline=None, max_examples=60)
@given(st.lists(st.tuples(st.integers(0, 4), st.booleans()), max_size=30))
def test_any_order_of_coming_and_going(steps) -> None:
    """After each step, every target is tracked correctly under its own id, in slots without gaps."""
    many = MultiTracker(ColourBackend())
    followed: Dict[int, int] = {}  # patch -> id
    for (patch, _), (frame, boxes) in zip(steps, FRAMES):
        if patch in followed:
            many.remove(followed.pop(patch))
        else:
            followed[patch] = many.add(frame, boxes[patch])
        tracks = many.update(frame)
        assert sorted(tracks) == sorted(followed.values()) == many.ids and len(many) == len(followed)
        for k, number in followed.items():
            assert number in many and iou(tracks[number].box, boxes[k]) > 0.99


def test_a_target_can_be_reset_under_its_id() -> None:
    many = MultiTracker(ColourBackend())
    frame, boxes = FRAMES[0]
    ids = [many.add(frame, box) for box in boxes[:3]]
    many.reset(np.int64(ids[1]), frame, boxes[4])
    tracks = many.update(FRAMES[1][0])
    assert [type(number) for number in tracks] == [int] * 3, "ids must keep the type that add returned"
    assert many.backend.calls == [3], "all targets must share one call"
    assert [iou(tracks[i].box, FRAMES[1][1][k]) > 0.99 for i, k in zip(ids, (0, 4, 2))] == [True] * 3


def test_mistakes_do_not_affect_other_targets() -> None:
    many = MultiTracker(ColourBackend())
    frame, boxes = FRAMES[0]
    first = many.add(frame, boxes[0])
    many.remove(first)
    number = many.add(frame, boxes[0])
    assert number != first, "ids must not be reused"
    with pytest.raises(UsageError, match=f"no target with id {first}; ids: {number}"):
        many.remove(first)
    for error, image, box in ((BoxError, frame, (0, 0, -1, 5)), (FrameError, frame[..., 0], boxes[1])):
        with pytest.raises(error):
            many.add(image, box)
    with pytest.raises(FrameError):
        many.update(None)
    assert many.ids == [number]
    assert iou(many.update(FRAMES[1][0])[number].box, FRAMES[1][1][0]) > 0.99
    assert MultiTracker(ColourBackend()).update(frame) == {}


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
@pytest.mark.parametrize("threads", [1, 2])
def test_several_targets_agree_with_single_trackers(batch_model: Path, threads: int, backend: str) -> None:
    """With any distribution over the threads, and even if the backend has to grow."""
    pytest.importorskip(backend)
    frames, boxes = default_clip(9)[0], [(10 + 30 * k, 20 + 20 * k, 30 + 4 * k, 40 - 3 * k) for k in range(6)]
    single = Tracker.load(batch_model, "onnxruntime", threads=1)
    with MultiTracker.load(batch_model, backend, threads=threads, capacity=2) as many:
        first = many.add(frames[0], boxes[0])
        many.update(frames[1])
        many.remove(first)
        check_several(many, single, frames, boxes, pixels=0.05, score=1e-3)
        with pytest.raises(BackendError, match="no slot 9"):
            many.backend.template(FRAMES[0][0], crop_window(Box(*boxes[0]), 2.0), 9)


@pytest.mark.parametrize("backend", ["onnxruntime", "openvino"])
def test_a_failing_search_raises_after_all_have_stopped(backend: str, batch_model: Path, monkeypatch: Any) -> None:
    pytest.importorskip(backend)
    many = MultiTracker.load(batch_model, backend, threads=2, capacity=4)
    numbers = [many.add(FRAMES[0][0], (10, 20, 30, 40)) for _ in range(4)]
    engine: Any = many.backend
    bound, ran = engine._bound_search, []

    def failing(network: Any, slot: int) -> Any:
        def run() -> None:
            bound(network, slot)()
            ran.append(slot)
            if slot == 1:
                raise RuntimeError("out of memory")

        return run

    with monkeypatch.context() as patch:
        patch.setattr(engine, "_bound_search", failing)
        with pytest.raises(RuntimeError, match="out of memory"):
            many.update(FRAMES[0][0])
    stopped = list(ran)
    sleep(0.1)
    assert ran == stopped, "a thread was still running"
    assert list(many.update(FRAMES[0][0])) == numbers
    many.close()


def test_a_forked_process_tracks_without_the_parents_threads_and_ends(batch_model: Path) -> None:
    program = f"""if True:
        import numpy, os, signal, sys
        from asymtrack_edge import MultiTracker
        frame = numpy.zeros((60, 80, 3), numpy.uint8)
        many = MultiTracker.load({str(batch_model)!r}, "onnxruntime", threads=2, capacity=2)
        many.add(frame, (10, 20, 30, 40)), many.add(frame, (40, 20, 30, 40)), many.update(frame)
        child = os.fork()
        if child:
            sys.exit(bool(os.waitpid(child, 0)[1]))
        signal.alarm(20)
        many.update(frame)
    """
    assert subprocess.run([sys.executable, "-W", "ignore", "-c", program], timeout=60).returncode == 0
