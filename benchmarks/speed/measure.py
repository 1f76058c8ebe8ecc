"""The protocols of ``asymtrack-bench``, and its subcommands, which fill a report."""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
from contextlib import ExitStack
from itertools import chain
from time import perf_counter
from typing import Callable, Dict, List, Optional, Sequence

import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.benchmarks import paper as published
from asymtrack_edge.benchmarks.speed import cases
from asymtrack_edge.benchmarks.speed import energy as joules
from asymtrack_edge.benchmarks.speed.machine import conditions, package
from asymtrack_edge.benchmarks.speed.race import Case, compare, race
from asymtrack_edge.benchmarks.speed.report import NETWORK, Bench, Report
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.errors import BackendError, MissingDependencyError, UsageError
from asymtrack_edge.files import check_folder
from asymtrack_edge.runtime.backends.base import device_index
from asymtrack_edge.runtime.sources import open_source
from asymtrack_edge.variants import VARIANTS, get_variant

#: Calls of P1 and P2, as in the authors' script.
WARMUP, CALLS = 100, 1000
#: Calls of P5, frames of P6, and calls for each number of targets.
FEWER_CALLS = 300


def networks(
    bench: Bench, raced: Sequence[Case], seconds: Optional[float], base: Optional[str] = None, calls: int = CALLS
) -> None:
    """P1 and P2: search networks take turns. P1 is the throughput, P2 the latency of the same calls.

    On a device that works asynchronously (PyTorch on CUDA), P1 is instead one burst after the turns: as many calls back
    to back, with one wait at the end. ``seconds`` limits all cases together; None makes all ``calls`` of each case.
    ``base`` is the name of the case that the others are compared with; None for the first.
    """
    before = conditions(bench.gpu)
    seen = race(raced, seconds, calls, WARMUP, bench.tick)
    for case in raced:
        samples, notes = list(chain.from_iterable(seen[case.name])), []
        count, total = len(samples), sum(samples)
        if count < calls:
            notes.append(f"the time limit ended it before {WARMUP} warm-up and {calls} timed calls")
        if case.burst is not None:
            case.burst(min(10, count))
            total = case.burst(count)
            notes.append(f"fps: one burst of {count} calls after the turns")
        bench.add(NETWORK, case, before, *notes, samples=samples, fps=case.batch * count / total)
    bench.report.ratios += compare("P2", seen, base or raced[0].name)


def updates(bench: Bench, raced: Sequence[Case], seconds: Optional[float]) -> None:
    """P5: whole ``update(frame)`` calls; trackers take turns."""
    before = conditions(bench.gpu)
    seen = race(raced, seconds, FEWER_CALLS, warmup=10, tick=bench.tick)
    for case in raced:
        samples = list(chain.from_iterable(seen[case.name]))
        # Only this package's trackers report the time of each stage.
        by_stage = {name: 1000 * total / len(samples) for name, total in case.stages.items()}
        notes = [f"the time limit ended it before {FEWER_CALLS} timed calls"] * (len(samples) < FEWER_CALLS)
        bench.add("P5", case, before, *notes, samples=samples, fps=1 / float(np.median(samples)), stages=by_stage)
    bench.report.ratios += compare("P5", seen, raced[0].name)


def dropped_frames(seconds: Sequence[float], fps: float) -> int:
    """The number of frames from a camera of ``fps`` that a tracker with these times per frame would miss.

    The camera delivers frame k at k / fps and keeps only its newest frame. The tracker takes the newest frame
    when it is done, or waits for one. Frames between two that it takes are lost.
    """
    now, frame, lost = 0.0, 0, 0
    for duration in seconds:
        now = max(now, frame / fps) + duration
        # A frame that arrives at exactly this moment counts; rounding must not lose it.
        following = max(frame + 1, int(now * fps + 1e-9))
        lost += following - frame - 1
        frame = following
    return lost


def end_to_end(bench: Bench, case: Case, clip: cases.VideoClip, seconds: Optional[float]) -> None:
    """P6: from the encoded frame to the box, with the time of each stage.

    The run ends after ``FEWER_CALLS`` frames, or after ``seconds`` and at least ten frames.
    """
    before, tracker = conditions(bench.gpu), case.subject
    decode: List[float] = []
    total: List[float] = []
    with open_source(clip.source) as source:
        frames = (frame for frame in source if frame is not None)
        tracker.init(first := next(frames), tuple(clip.box))  # reading the clip found at least two frames
        tracker.update(first)  # the first call also allocates memory
        stages = dict(tracker.seconds)
        while len(total) < FEWER_CALLS and (seconds is None or sum(total) < seconds or len(total) < 10):
            started = perf_counter()
            frame = next(frames, None)
            if frame is None:
                break
            decode.append(perf_counter() - started)
            tracker.update(frame)
            total.append(perf_counter() - started)
            bench.tick(case.name)
    stages = {"decode": sum(decode), **{name: tracker.seconds[name] - began for name, began in stages.items()}}
    by_stage = {name: 1000 * spent / len(total) for name, spent in stages.items()}
    by_stage["other"] = max(0.0, 1000 * sum(total) / len(total) - sum(by_stage.values()))
    dropped = {fps: dropped_frames(total, fps) for fps in (30, 60)}
    values = {f"% dropped at {fps} fps": 100.0 * lost / (lost + len(total)) for fps, lost in dropped.items()}
    note = "dropped frames are calculated from the measured times, for a camera that keeps its newest frame"
    bench.add("P6", case, before, note, samples=total, fps=len(total) / sum(total), stages=by_stage, values=values)


def _open(bench: Bench, specs: Dict[str, TrackerSpec], make: Callable[[str, TrackerSpec], Case]) -> List[Case]:
    """Makes a case of every spec. If there are several, those that cannot run here are left out and named."""
    opened = []
    for name, spec in specs.items():
        try:
            opened.append(bench.keep(make(name, spec)))
        except (BackendError, MissingDependencyError, UsageError) as error:
            if len(specs) == 1:
                raise
            bench.report.say(f"{name} was left out: {error}")
            bench.left_out |= not isinstance(error, UsageError)  # UsageError: options that exclude each other
    if not opened:
        raise UsageError("; ".join(bench.report.messages))
    return opened


def _networks(a: argparse.Namespace, bench: Bench, seconds: Optional[float]) -> None:
    """P1 and P2 of all combinations; with ``--reference``, the reference form of the first one comes before them."""
    raced = _open(bench, cases.combinations(a), cases.network_case)
    if a.reference:
        variant = get_variant(raced[0].tracker.replace("AsymTrack-", ""))
        raced.insert(0, bench.keep(cases.reference_case(variant, raced[0].device, raced[0].threads)))
    networks(bench, raced, seconds)


def speed(a: argparse.Namespace, bench: Bench) -> None:
    """P1, P2, P5 and P6 of all combinations."""
    seconds, wanted, specs = None if a.full else a.seconds, set(a.protocol), cases.combinations(a)
    for name, needs in (("tracker", {"P5"}), ("clip", {"P5", "P6"}), ("reference", {"P1", "P2"})):
        if getattr(a, name) and not wanted & needs:
            raise UsageError(f"--{name} is for {' and '.join(sorted(needs))}: add {min(needs)} to --protocol")
    for name in a.tracker:
        TrackerSpec(name).identity()  # refuses a wrong name before anything is measured
    groups = bool(wanted & {"P1", "P2"}) + ("P5" in wanted) + 0.5 * ("P6" in wanted) * len(specs)
    bench.expect((seconds or 60.0) * groups)
    clip = cases.make_clip(bench.folder, a.clip, a.box) if wanted & {"P5", "P6"} else None
    if wanted & {"P1", "P2"}:
        _networks(a, bench, seconds)
        bench.report.paper += published.beside_table_1(bench.report.rows)
    if clip is not None:
        ours = _open(bench, specs, lambda name, spec: cases.tracker_case(name, spec, clip))
        if "P5" in wanted:
            # Mapping frames is faster on some boards and slower on others.
            mapped = [c.name for c in ours if c.subject.backend.integrated]
            both = [bench.keep(cases.tracker_case(f"{n}, mapped", specs[n], clip, True)) for n in mapped]
            rivals = {name: TrackerSpec(name, threads=ours[0].threads) for name in a.tracker}
            others = [bench.keep(cases.tracker_case(name, spec, clip)) for name, spec in rivals.items()]
            updates(bench, [*ours, *both, *others], seconds)
        if "P6" in wanted:
            for case in ours:
                end_to_end(bench, case, clip, seconds and 0.5 * seconds)


def ab(a: argparse.Namespace, bench: Bench) -> None:
    """P2 of several networks."""
    if len(cases.combinations(a)) + a.reference < 2:
        raise UsageError("a comparison needs two cases: name another model, --backend A,B or --reference")
    bench.expect(a.seconds)
    _networks(a, bench, a.seconds)
    bench.left_out |= not bench.report.ratios


def targets(a: argparse.Namespace, bench: Bench) -> None:
    """P2 for several numbers of targets; for each number, one call for all and one call per target take turns."""
    bench.expect(a.seconds)
    spec = TrackerSpec.of(a.model, a)
    for count in a.counts:
        text = f"({count} target{'s' * (count > 1)})"
        ways = {f"one by one {text}": False, f"together {text}": True}
        raced = [bench.keep(cases.network_case(name, spec, count, way)) for name, way in ways.items()]
        networks(bench, raced, a.seconds / len(a.counts), calls=FEWER_CALLS)
        for row in bench.report.rows[-2:]:
            row["values"]["ms per target"] = row["latency"]["median"] / count


#: Imports what a user's program imports, loads a model, tracks briefly and prints the times.
_CHILD = """
import sys
sys.path[:] = sys.argv[2:]  # as here: not the working directory
import json, time
began = time.perf_counter()
from asymtrack_edge.runtime import Tracker
imported = time.perf_counter()
gpu, opening = json.loads(sys.argv[1])
cpu = time.process_time()
tracker = Tracker.load(**opening)
loaded, cpu = time.perf_counter(), time.process_time() - cpu
import numpy as np
frame = np.random.RandomState(0).randint(0, 256, (720, 1280, 3)).astype(np.uint8)
first = time.perf_counter()
tracker.init(frame, (600, 300, 80, 60))
tracker.update(frame)
tracked = time.perf_counter()
for _ in range(20):
    tracker.update(frame)
from asymtrack_edge.benchmarks.speed.machine import process_memory
print(json.dumps({"import (s)": imported - began, "load (s)": loaded - imported, "load, processor time (s)": cpu,
                  "first init and update (s)": tracked - first, **process_memory(gpu)}))
"""


def startup(a: argparse.Namespace, bench: Bench) -> None:
    """Start-up time and memory of fresh processes: this process has already imported everything."""
    bench.expect(3.0 * a.runs)
    before = conditions(bench.gpu)
    answers: List[Dict[str, float]] = []
    for _ in range(a.runs):
        opening = json.dumps([bench.gpu, TrackerSpec.of(a.model, a).load_arguments])
        done = subprocess.run([sys.executable, "-c", _CHILD, opening, *sys.path], capture_output=True, text=True)
        if done.returncode:
            lines = done.stderr.strip().splitlines() or ["no message"]
            raise BackendError(f"a tracking process failed: {lines[-1].split('Error: ', 1)[-1]}")
        answers.append(json.loads(done.stdout.splitlines()[-1]))
        bench.tick("startup")
    found = {key: [answer[key] for answer in answers if key in answer] for key in answers[0]}
    values = {key: float(np.median(v) if key.endswith("(s)") else max(v)) for key, v in found.items()}
    case = bench.keep(cases.network_case(a.model, TrackerSpec.of(a.model, a)))
    bench.add("startup", case, before, f"times: median of {a.runs} processes; memory: maximum", values=values)


def paper(a: argparse.Namespace, bench: Bench) -> None:
    """T, S and B, also in the reference form, beside Tables 1 and 2; the models of Table 4 beside that table."""
    torch = package("torch") is not None
    bench.expect(a.seconds * (1 + torch))
    raced = [bench.keep(cases.network_case(name, TrackerSpec.of(name, a))) for name in VARIANTS]
    device, threads = raced[0].device, raced[0].threads
    for variant in VARIANTS.values() if torch else ():
        name = f"{variant.name}, reference form, PyTorch"
        raced.append(bench.keep(cases.reference_case(variant, device, threads, name)))
    networks(bench, raced, a.seconds)
    bench.report.paper += published.beside_table_1(bench.report.rows)
    if not torch:
        bench.report.say("the reference form and Table 4 need PyTorch (extra export), which is not installed")
        return
    models = [
        bench.keep(cases.reference_case(variant, device, threads, f"Table 4, {label}"))
        for label, variant in published.TABLE_4.items()
    ]
    first = len(bench.report.rows)
    networks(bench, models, a.seconds, base=models[-1].name)
    bench.report.paper += published.beside_table_4(bench.report.rows[first:], bench.report.ratios)


def energy(a: argparse.Namespace, bench: Bench) -> None:
    """P8 at camera rate and at full speed."""
    bench.expect(2 * (a.seconds + joules.IDLE_SECONDS))
    sensors = joules.find_sensors(bench.gpu)
    clip = cases.make_clip(bench.folder)
    for paced in (a.fps, None):
        way = "full speed" if paced is None else f"{paced:g} fps"
        case = bench.keep(cases.tracker_case(f"{a.model}, {way}", TrackerSpec.of(a.model, a), clip))
        before = conditions(bench.gpu)

        def step(case: Case = case) -> None:
            bench.tick(case.name)
            case.run(1)

        values = joules.measure(step, sensors, a.seconds, paced)
        notes = (f"power from {', '.join(sensors)}", "update() on frames in memory; no camera, no decoding")
        bench.add("P8", case, before, *notes, fps=values.pop("fps"), values=values)


_COMMANDS: Dict[str, Callable[[argparse.Namespace, Bench], None]] = {
    body.__name__: body for body in (speed, ab, targets, startup, paper, energy)
}


def main(a: argparse.Namespace) -> int:
    """Measures, prints and writes a report; ``a.line`` is the command line."""
    if a.command == "paper" and a.published:
        if a.output or a.json:
            raise UsageError("--published only prints: leave out --output and --json")
        print(published.tables(), end="")
        return 0
    if a.output is not None:
        check_folder(a.output)
        a.output.mkdir(parents=True, exist_ok=True)
    bench = Bench(Report(a.line), 0 if a.device == "cpu" else device_index(a.device))
    try:
        with bench.stack:
            _COMMANDS[a.command](a, bench)
    except BaseException as error:
        bench.report.say(f"incomplete: {error if isinstance(error, Exception) else 'interrupted'}")
        raise
    finally:
        if bench.report.rows:
            _deliver(bench.report, a)
    return int(bench.left_out)


def _deliver(report: Report, a: argparse.Namespace) -> None:
    """Prints and writes what was measured, even after an error or interrupt; if one output fails, the rest follow."""
    with ExitStack() as last_first:
        if a.output is not None:
            last_first.callback(report.write, a.output)
        last_first.callback(cli.write_json, a.json, report.document())
        if a.json != "-":
            last_first.callback(print, report.markdown(), flush=True)
