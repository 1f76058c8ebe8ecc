"""The protocols: what measures cases and adds rows to a report (energy, P8: ``energy``)."""

from __future__ import annotations

from contextlib import ExitStack
from time import monotonic, perf_counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence

from asymtrack_edge.benchmarks.speed.cases import Clip, gpu_index
from asymtrack_edge.benchmarks.speed.machine import conditions, facts, package
from asymtrack_edge.benchmarks.speed.race import Case, compare, flat, race, summarise
from asymtrack_edge.benchmarks.speed.report import NETWORK, Report
from asymtrack_edge.errors import SourceError
from asymtrack_edge.runtime.sources import open_source

#: Of P1 and P2 (the authors' script).
WARMUP, CALLS = 100, 1000
#: Frame rates at which P6 says how many frames a camera would lose.
CAMERA_FPS = (30.0, 60.0)


class Bench:
    """What all protocols share in a run on ``device``, as ``--device`` names it.

    Attributes:
        report: gets the rows.
        gpu: index of the CUDA device that is used, if any.
        stack: closes what the run opened.
        tick: called with the name of a case now and then.
    """

    def __init__(self, report: Report, device: str = "auto") -> None:
        self.report = report
        self.gpu = gpu_index(device)
        self.stack = ExitStack()
        self.tick: Callable[[str], None] = lambda name: None

    def expect(self, total: float) -> None:
        """Shows a progress bar over ``total`` seconds, where tqdm is installed."""
        tqdm = package("tqdm")
        if tqdm is None:
            return
        shape = "{desc} {percentage:3.0f} %|{bar}| {elapsed}<{remaining}"
        bar = self.stack.enter_context(tqdm.tqdm(total=total, bar_format=shape, leave=False, disable=None))
        began = monotonic()

        def tick(name: str) -> None:
            bar.set_description_str(name[:40], refresh=False)
            bar.update(min(monotonic() - began, total) - bar.n)

        self.tick = tick

    def keep(self, case: Case) -> Case:
        """A case that is closed at the end."""
        self.stack.callback(case.close)
        return case

    def add(self, protocol: str, case: Case, before: Dict[str, Any], *notes: str, **figures: Any) -> None:
        """Adds a row that ends now; see ``Report`` for what it holds, ``samples`` here in seconds."""
        samples = figures.pop("samples", ())
        row = {
            "protocol": protocol,
            "case": case.facts(),
            "machine": facts(self.gpu),
            "before": before,
            "after": conditions(self.gpu),
            "latency": summarise(samples) if samples else None,
            "notes": [*case.notes, *notes],
        }
        self.report.rows.append({**row, "fps": None, "stages": {}, "values": {}, **figures})


def networks(
    bench: Bench, cases: Sequence[Case], seconds: Optional[float], base: Optional[str] = None, calls: int = CALLS
) -> None:
    """P1 and P2: search networks take turns. P1 is the throughput, P2 the latency of the same calls.

    Only where a device works on its own (PyTorch on CUDA), P1 is one burst after the turns, as many
    calls back to back, waited for once.

    Args:
        bench: of the run.
        cases: with distinct names.
        seconds: for all; None for the full number of calls.
        base: name of the case that the others are compared with; None for the first.
        calls: timed, per case.
    """
    before = conditions(bench.gpu)
    seen = race(cases, seconds, calls, WARMUP, bench.tick)
    for case in cases:
        samples, notes = flat(seen[case.name]), []
        count, total = len(samples), sum(samples)
        if count < calls:
            notes.append(f"stopped by time before {WARMUP} warm-up and {calls} timed calls (--full makes them all)")
        if case.burst is not None:
            case.burst(min(10, count))
            total = case.burst(count)
            notes.append(f"fps: one burst of {count} calls after the turns")
        bench.add(NETWORK, case, before, *notes, samples=samples, fps=case.batch * count / total)
    bench.report.ratios += compare("P2", seen, base or cases[0].name)


def update(bench: Bench, cases: Sequence[Case], seconds: Optional[float], calls: int = 300) -> None:
    """P5: whole ``update(frame)`` calls; trackers take turns."""
    before = conditions(bench.gpu)
    # Other trackers than this package's do not say where their time goes.
    began = [(case.calls, dict(getattr(case.subject, "seconds", {}))) for case in cases]
    seen = race(cases, seconds, calls, warmup=10, tick=bench.tick)
    for case, (made, stages) in zip(cases, began):
        samples = flat(seen[case.name])
        latency = summarise(samples)
        bench.add(
            "P5",
            case,
            before,
            samples=samples,
            fps=1000 / latency["median"],
            stages=_stages(stages, case.subject, case.calls - made),
            values={"fps of the trimmed mean": 1000 / latency["trimmed_mean"]},
        )
    bench.report.ratios += compare("P5", seen, cases[0].name)


def _stages(before: Mapping[str, float], tracker: Any, calls: int) -> Dict[str, float]:
    """Milliseconds per call by stage since ``before``, an earlier reading of ``Tracker.seconds``."""
    # ``decode`` of a tracker decodes the box, not the frame.
    names = {name: "decode box" if name == "decode" else name for name in before}
    return {new: 1000 * (tracker.seconds[name] - before[name]) / calls for name, new in names.items()}


def dropped_frames(seconds: Sequence[float], fps: float) -> int:
    """Frames that a camera of ``fps`` would lose to a tracker with these times per frame.

    The camera delivers frame k at k / fps and keeps only its newest frame; the tracker takes the newest
    when it is done, or waits. Frames between two that were taken are lost.
    """
    now, frame, lost = 0.0, 0, 0
    for duration in seconds:
        now = max(now, frame / fps) + duration
        # A frame that arrives in this very moment counts; rounding must not lose it.
        following = max(frame + 1, int(now * fps + 1e-9))
        lost += following - frame - 1
        frame = following
    return lost


def end_to_end(bench: Bench, case: Case, clip: Clip, seconds: Optional[float], limit: int = 300) -> None:
    """P6: from the encoded frame to the box, with the time of each stage.

    ``seconds`` end the run early, after ten frames at least; else ``limit`` frames do. Raises SourceError where the
    clip has fewer than two.
    """
    before, tracker = conditions(bench.gpu), case.subject
    decode: List[float] = []
    total: List[float] = []
    with open_source(clip.source) as source:
        frames = (frame for frame in source if frame is not None)
        first = next(frames, None)
        if first is not None:
            tracker.init(first, tuple(clip.box))
            tracker.update(first)  # the first call pays for allocations
        stages = dict(tracker.seconds)
        while len(total) < limit and (seconds is None or sum(total) < seconds or len(total) < 10):
            started = perf_counter()
            frame = next(frames, None)
            if frame is None:
                break
            decode.append(perf_counter() - started)
            tracker.update(frame)
            total.append(perf_counter() - started)
            bench.tick(case.name)
    if not total:
        raise SourceError("the clip has fewer than two readable frames: give a longer one")
    by_stage = {"decode": 1000 * sum(decode) / len(decode), **_stages(stages, tracker, len(total))}
    by_stage["other"] = max(0.0, 1000 * sum(total) / len(total) - sum(by_stage.values()))
    values = {"frames": float(len(total))}
    for fps in CAMERA_FPS:
        lost = dropped_frames(total, fps)
        values[f"dropped at {fps:g} fps (%)"] = 100.0 * lost / (lost + len(total))
    note = "dropped frames follow from the measured times and a camera that keeps its newest frame"
    speed = len(total) / sum(total)
    bench.add("P6", case, before, note, samples=total, fps=speed, stages=by_stage, values=values)
