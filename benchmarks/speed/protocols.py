"""The protocols: functions that measure cases and add rows to a report (energy, P8: ``energy``)."""

from __future__ import annotations

import re
import shutil
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from time import perf_counter
from typing import Any, Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.benchmarks.speed.cases import Clip, UpdateStep
from asymtrack_edge.benchmarks.speed.machine import conditions, facts, output_of
from asymtrack_edge.benchmarks.speed.race import Case, Race, race, summarise
from asymtrack_edge.benchmarks.speed.report import NETWORK, Report
from asymtrack_edge.errors import BackendError, SourceError
from asymtrack_edge.manifest import Manifest

#: Of P1 and P2 (the authors' script).
WARMUP, CALLS = 100, 1000
#: Frame rates at which P6 says how many frames a camera would lose.
CAMERA_FPS = (30.0, 60.0)


@dataclass
class Bench:
    """What all protocols share in a run.

    Attributes:
        report: gets the rows.
        seconds: time for one group of cases; None for the protocol's full number of calls.
        gpu: index of the CUDA device that is used, if any.
        tick: called with the name of a case now and then.
    """

    report: Report
    seconds: Optional[float]
    gpu: int = 0
    tick: Callable[[str], None] = lambda name: None

    def add(self, protocol: str, case: Case, before: Dict[str, Any], **figures: Any) -> None:
        """Adds a row that ends now; see ``Report`` for what it holds, ``samples`` here in seconds."""
        samples = figures.pop("samples", ())
        empty: Dict[str, Any] = {"fps": None, "stages": {}, "values": {}, "share_of_peak": None}
        self.report.rows.append(
            {
                "protocol": protocol,
                "case": case.facts(),
                "machine": facts(self.gpu),
                "before": before,
                "after": conditions(self.gpu),
                "latency": summarise(samples) if samples else None,
                "notes": [*case.notes, *figures.pop("notes", ())],
                **empty,
                **figures,
            }
        )

    def compare(self, protocol: str, seen: Race, cases: Sequence[Case], base: Optional[str] = None) -> None:
        """Adds the ratios of all cases over ``base`` (None: the first)."""
        base = base or cases[0].name
        others = (case.name for case in cases if case.name != base)
        self.report.ratios += [{"protocol": protocol, **seen.ratio(name, base)} for name in others]


def networks(
    bench: Bench,
    cases: Sequence[Case],
    peak: Optional[Case] = None,
    base: Optional[str] = None,
    calls: int = CALLS,
) -> None:
    """P1 and P2: search networks take turns. P1 is the throughput, P2 the latency of the same calls.

    Only where a device works on its own (PyTorch on CUDA), P1 is one burst after the turns, as many
    calls back to back, waited for once.

    Args:
        bench: shared settings.
        cases: with distinct names.
        peak: takes part, so that the share of peak holds for the same moments.
        base: name of the case that the others are compared with; None for the first.
        calls: timed, per case.
    """
    before = conditions(bench.gpu)
    seen = race([*cases, peak] if peak else cases, bench.seconds, calls, WARMUP, bench.tick)
    for case in cases:
        samples = seen.all(case.name)
        count, notes = len(samples), []
        if count < calls or seen.warmup[case.name] < WARMUP:
            notes.append(f"stopped by time before {WARMUP} warm-up and {calls} timed calls (--full makes them all)")
        values = {}
        if case.multiply_adds:
            values["G multiply-adds/s"] = case.multiply_adds * case.batch / float(np.median(samples)) / 1e9
        if not case.on_gpu:
            # What other programs take away lengthens the calls, hardly their processor time.
            values["processor ms"] = 1000 * float(np.median(seen.processor[case.name]))
        seconds = sum(samples)
        if case.step.queues:
            case.step.burst(min(10, count))
            seconds = case.step.burst(count)
            notes.append(f"fps: one burst of {count} calls after the turns")
        share = seen.share_of_peak(case, peak)
        fps = case.batch * count / seconds
        bench.add(NETWORK, case, before, samples=samples, fps=fps, values=values, share_of_peak=share, notes=notes)
    bench.compare("P2", seen, cases, base)
    if peak is not None and peak.multiply_adds is not None:
        rate = peak.multiply_adds / float(np.percentile(seen.all(peak.name), 5)) / 1e9
        bench.report.values[f"peak rate, {peak.threads} threads (G multiply-adds/s)"] = rate


def update(bench: Bench, cases: Sequence[Case], calls: int = 300) -> None:
    """P5: whole ``update(frame)`` calls; trackers take turns."""
    before = conditions(bench.gpu)
    began = {case.name: (case.step.calls, case.step.stages()) for case in cases}  # type: ignore[attr-defined]
    seen = race(cases, bench.seconds, calls, warmup=10, tick=bench.tick)
    for case in cases:
        assert isinstance(case.step, UpdateStep)
        made, stages = began[case.name]
        samples = seen.all(case.name)
        latency = summarise(samples)
        bench.add(
            "P5",
            case,
            before,
            samples=samples,
            fps=1000 / latency["median"],
            stages=_milliseconds(stages, case.step.stages(), case.step.calls - made),
            values={"fps of the trimmed mean": 1000 / latency["trimmed_mean"]},
        )
    bench.compare("P5", seen, cases)


def _milliseconds(before: Mapping[str, float], after: Mapping[str, float], calls: int) -> Dict[str, float]:
    """Milliseconds per call by stage between two readings of ``Tracker.seconds``."""
    # ``decode`` of a tracker decodes the box, not the frame.
    return {("decode box" if n == "decode" else n): 1000 * (after[n] - before[n]) / max(1, calls) for n in after}


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


def end_to_end(bench: Bench, case: Case, clip: Clip, limit: int = 300) -> None:
    """P6: from the encoded frame to the box, with the time of each stage.

    Args:
        bench: shared settings; half its ``seconds`` end the run early.
        case: whose step is an ``UpdateStep`` over this package's ``Tracker``.
        clip: opened anew and tracked from its first frame.
        limit: most frames.

    Raises:
        SourceError: fewer than two frames can be read.
    """
    before, tracker = conditions(bench.gpu), case.step.tracker  # type: ignore[attr-defined]
    decode: List[float] = []
    total: List[float] = []
    with clip.open() as source:
        frames = iter(source)
        first = next(frames, None)
        if first is None:
            raise SourceError(f"{source.name} has no readable frame to start from")
        tracker.init(first, tuple(clip.box))
        tracker.update(first)  # the first call pays for allocations
        stages = dict(tracker.seconds)
        while len(total) < limit and (bench.seconds is None or sum(total) < 0.5 * bench.seconds or len(total) < 10):
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
    by_stage = {"decode": 1000 * sum(decode) / len(decode)}
    by_stage.update(_milliseconds(stages, tracker.seconds, len(total)))
    by_stage["other"] = max(0.0, 1000 * sum(total) / len(total) - sum(by_stage.values()))
    values = {"frames": float(len(total))}
    for fps in CAMERA_FPS:
        lost = dropped_frames(total, fps)
        values[f"dropped at {fps:g} fps (%)"] = 100.0 * lost / (lost + len(total))
    note = "dropped frames follow from the measured times and a camera that keeps its newest frame"
    bench.add(
        "P6", case, before, samples=total, fps=len(total) / sum(total), stages=by_stage, values=values, notes=(note,)
    )


def find_trtexec() -> Optional[str]:
    """Path of trtexec; None if it is not installed."""
    usual = "/usr/src/tensorrt/bin/trtexec"  # where NVIDIA's packages put it, on Jetson too
    return shutil.which("trtexec") or (usual if Path(usual).is_file() else None)


def parse_trtexec(text: str) -> Tuple[float, Dict[str, float]]:
    """The performance summary that trtexec prints (TensorRT 8.4 to 10).

    Returns:
        Queries per second; median milliseconds by part: Latency, Enqueue Time, H2D Latency, GPU Compute
        Time, D2H Latency.

    Raises:
        BackendError: there is no summary; the message has trtexec's first error.
    """
    throughput = re.search(r"Throughput: ([\d.]+) qps", text)
    medians = {name: float(ms) for name, ms in re.findall(r"\[I\] ([\w ]+): min = .* median = ([\d.]+) ms", text)}
    if not throughput or "Latency" not in medians:
        error = re.search(r"\[E\] (.*)", text)
        why = error.group(1) if error else "it printed no performance summary"
        raise BackendError(f"trtexec could not measure this engine: {why}")
    return float(throughput.group(1)), medians


def trtexec(
    bench: Bench,
    case: Case,
    folder: Path,
    manifest: Manifest,
    run: Callable[[List[str]], str] = partial(output_of, timeout=120.0),
) -> None:
    """P4: trtexec itself, with its defaults (200 ms warm-up, 3 s, 10 iterations), where it is installed.

    Args:
        bench: shared settings.
        case: a TensorRT backend.
        folder: of the model.
        manifest: of the model.
        run: runs a command and returns what it prints.

    Raises:
        BackendError: it failed.
    """
    tool = find_trtexec()
    engines = [name for name in manifest.engines if name.startswith("search")]
    if tool is None or not engines:
        why = "trtexec is not installed" if tool is None else f"{folder} has no search engine"
        bench.report.say(f"P4 was left out: {why}")
        return
    command = [tool, f"--loadEngine={folder / engines[0]}", "--percentile=90,95,99"]
    if manifest.max_batch > 1:
        shapes = (f"{s.name}:{'x'.join(map(str, (case.batch, *s.shape)))}" for s in (manifest.search, *manifest.state))
        command.append("--shapes=" + ",".join(shapes))
    before = conditions(bench.gpu)
    throughput, medians = parse_trtexec(run(command))
    stages = {"copy in": "H2D Latency", "infer": "GPU Compute Time", "copy out": "D2H Latency"}
    bench.add(
        "P4",
        case,
        before,
        fps=case.batch * throughput,
        stages={new: medians[old] for new, old in stages.items() if old in medians},
        values={f"{name} median (ms)": ms for name, ms in medians.items()},
        notes=("trtexec's own defaults; CUDA graph, spin wait and transfers differ between its versions",),
    )
