"""The protocols P5 to P7: whole trackers, on frames in memory, from a video and over a data set."""

from __future__ import annotations

from time import perf_counter
from typing import Any, Callable, Dict, Iterable, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.benchmarks.speed.protocols import Bench
from asymtrack_edge.benchmarks.speed.rows import Findings, Row, kept_samples
from asymtrack_edge.benchmarks.speed.subjects import Subject, UpdateStep, stage_milliseconds
from asymtrack_edge.benchmarks.speed.timing import Step, interleave, summarise
from asymtrack_edge.errors import SourceError

#: Frame rates at which P6 says how many frames a camera would lose.
CAMERA_FPS = (30.0, 60.0)


def update(
    bench: Bench, candidates: Sequence[Tuple[Subject, UpdateStep]], base: Optional[str] = None, calls: int = 300
) -> Findings:
    """P5: whole ``update(frame)`` calls; trackers take turns."""
    before = bench.probe()
    steps: Dict[str, Step] = {s.name: step for s, step in candidates}
    stages_before = {s.name: step.stages() for s, step in candidates}
    counters = {name: _Counting(step) for name, step in steps.items()}
    rounds = interleave(dict(counters), bench.seconds, calls, warmup=10, tick=bench.tick)
    found = Findings()
    for subject, step in candidates:
        samples = rounds.all(subject.name)
        latency = summarise(samples)
        after = step.stages()
        stages = stage_milliseconds(stages_before[subject.name], after, counters[subject.name].calls) if after else {}
        found.rows.append(
            bench.row(
                "P5",
                subject,
                before,
                latency=latency,
                fps=1000 / latency.median,
                stages=stages,
                values={"fps of the trimmed mean": 1000 / latency.trimmed_mean},
                samples=kept_samples(samples),
            )
        )
    base = base or candidates[0][0].name
    found.ratios = [("P5", rounds.compare(s.name, base)) for s, _ in candidates if s.name != base]
    return found


class _Counting(Step):
    """Counts the calls of another step."""

    def __init__(self, step: Step) -> None:
        self.step = step
        self.calls = 0

    def sample(self) -> float:
        self.calls += 1
        return self.step.sample()


def dropped_frames(seconds: Sequence[float], fps: float) -> int:
    """Frames that a camera of ``fps`` would lose to a tracker with these times per frame.

    The camera delivers frame k at k / fps and keeps only its newest frame; the tracker takes the newest
    when it is done, or waits. Frames between two that were taken are lost.
    """
    now = 0.0
    frame = 0
    lost = 0
    for duration in seconds:
        now = max(now, frame / fps) + duration
        # A frame that arrives in this very moment counts; rounding must not lose it.
        newest = int(now * fps + 1e-9)
        following = max(frame + 1, newest)
        lost += following - frame - 1
        frame = following
    return lost


def end_to_end(
    bench: Bench,
    subject: Subject,
    tracker: Any,
    open_video: Callable[[], Any],
    box: Sequence[float],
    limit: Optional[int] = None,
) -> Row:
    """P6: from the encoded frame to the box, with the time of each stage.

    Args:
        bench: shared settings; ``seconds`` ends the run early.
        subject: the tracker's description.
        tracker: this package's ``Tracker``.
        open_video: opens a source of frames from its beginning.
        box: of the target in the first frame.
        limit: most frames.

    Raises:
        SourceError: fewer than two frames can be read.
    """
    before = bench.probe()
    decode: List[float] = []
    total: List[float] = []
    began = perf_counter()
    stages: Dict[str, float] = {}
    with open_video() as source:
        frames = iter(source)
        first = next(frames, None)
        if first is None:
            raise SourceError(f"{source.name} has no readable frame to start from")
        tracker.init(first, tuple(box))
        tracker.update(first)  # the first call pays for allocations
        stages = dict(tracker.seconds)
        while limit is None or len(total) < limit:
            started = perf_counter()
            frame = next(frames, None)
            if frame is None:
                break
            decoded = perf_counter()
            tracker.update(frame)
            total.append(perf_counter() - started)
            decode.append(decoded - started)
            bench.tick(f"P6 {subject.name}")
            if bench.seconds is not None and perf_counter() - began > 0.5 * bench.seconds and len(total) >= 10:
                break
    if not total:
        raise SourceError("the video has fewer than two readable frames: give a longer one")
    by_stage = {"decode": 1000 * sum(decode) / len(decode)}
    by_stage.update(stage_milliseconds(stages, tracker.seconds, len(total)))
    by_stage["other"] = max(0.0, 1000 * sum(total) / len(total) - sum(by_stage.values()))
    latency = summarise(total)
    values: Dict[str, float] = {"frames": float(len(total))}
    for fps in CAMERA_FPS:
        values[f"dropped at {fps:g} fps (%)"] = 100.0 * _share_dropped(total, fps)
    return bench.row(
        "P6",
        subject,
        before,
        latency=latency,
        fps=len(total) / sum(total),
        stages=by_stage,
        values=values,
        samples=kept_samples(total),
        notes=("dropped frames follow from the measured times and a camera that keeps its newest frame",),
    )


def _share_dropped(seconds: Sequence[float], fps: float) -> float:
    lost = dropped_frames(seconds, fps)
    return lost / (lost + len(seconds))


def data_set(
    bench: Bench, subject: Subject, tracker: Any, sequences: Iterable[Tuple[Iterable[np.ndarray], Sequence[float]]]
) -> Row:
    """P7: runs sequences from their first box, as a data set's toolkit times a tracker.

    As in the GOT-10k toolkit, the time of the first frame is that of ``init``, and decoding is outside.

    Args:
        bench: shared settings.
        subject: the tracker's description.
        tracker: has ``init`` and ``update``.
        sequences: frames, decoded as they are asked for, and the first box of each.

    Raises:
        SourceError: there are no frames.
    """
    before = bench.probe()
    times: List[float] = []
    count = 0
    for frames, box in sequences:
        for i, frame in enumerate(frames):
            began = perf_counter()
            if i == 0:
                tracker.init(frame, tuple(box))
            else:
                tracker.update(frame)
            times.append(perf_counter() - began)
        count += 1
        bench.tick(f"P7 {subject.name}")
    if not times:
        raise SourceError("the data set has no frames")
    return bench.row(
        "P7",
        subject,
        before,
        latency=summarise(times),
        fps=len(times) / sum(times),
        values={
            "frames / total time (fps)": len(times) / sum(times),
            "GOT-10k mean(1/t) (fps)": float(np.mean(1 / np.asarray(times))),
            "sequences": float(count),
        },
        samples=kept_samples(times),
        notes=("mean(1/t) overstates: a mean of speeds weighs the fast frames most",),
    )
