"""Timing that survives a noisy machine: cases take turns, and ratios are drawn round by round.

Other programs, clocks and temperature change the speed of a machine from one second to the next.
Cases measured one after the other are compared under different conditions. Here they take turns in
short bursts, in the opposite order every other round. What slows the machine down slows all cases of
a round, so that the ratio within the round holds. The spread of the ratios over the rounds says how
far the result can be trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from time import perf_counter, process_time, sleep
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import UsageError

#: Seconds that one case runs before the next one's turn.
TURN_SECONDS = 0.1
#: Longest wait for the other cases' threads before a turn, in seconds.
SETTLE_SECONDS = 0.1
#: Fewest rounds a comparison is drawn from.
LEAST_ROUNDS = 5
#: A middle-80-% range of ratios wider than this share of their median cannot size a difference.
WIDE = 0.20

#: A note on a case.
UNTRAINED = "untrained weights (speed does not depend on them)"

Clock = Callable[[], float]


class Step:
    """Something that is timed call by call.

    Args:
        call: returns when its work is done.
        clock: in seconds.

    Attributes:
        queues: whether ``burst`` is more than its calls one by one, because a device works on alone.
    """

    queues = False

    def __init__(self, call: Callable[[], object], clock: Clock = perf_counter) -> None:
        self._call = call
        self._clock = clock

    def sample(self) -> float:
        """Makes one call; seconds until its result was there."""
        began = self._clock()
        self._call()
        return self._clock() - began

    def turn(self, calls: int) -> List[float]:
        """Seconds of each of some calls, one after the other."""
        return [self.sample() for _ in range(calls)]

    def burst(self, calls: int) -> float:
        """Makes calls back to back, waiting for a device only after the last; seconds in all."""
        return sum(self.turn(calls))

    def processor_seconds(self) -> float:
        """Processor time that the step's process has used so far, all threads together."""
        return process_time()

    def close(self) -> None:
        """Gives back what the step holds."""


@dataclass
class Case:
    """One thing that is measured. All fields but ``step`` are printed with its figures.

    Attributes:
        name: short and unique in a run.
        step: runs it.
        tracker: ``"AsymTrack-T"`` or the name of somebody else's.
        backend: of ``cli.BACKENDS``, or ``"torch"``, ``"opencv"``, ...
        device: ``"cpu"`` or ``"cuda:0"``: where the network ran.
        precision: ``"fp32"``, ``"fp16"``, ``"bf16"``, ``"int8"``; empty where nobody says.
        threads: CPU threads; None for the runtime's own choice.
        batch: targets in one call.
        template: ``"cached"`` (computed once, at init) or ``"its own"`` (a library's business).
        model_sha256: of the search network's file, or of the weights in memory.
        multiply_adds: of one call at batch 1; None if unknown.
        notes: what a reader must know of these figures.
    """

    name: str
    step: Step
    tracker: str = ""
    backend: str = ""
    device: str = "cpu"
    precision: str = "fp32"
    threads: Optional[int] = None
    batch: int = 1
    template: str = "cached"
    model_sha256: str = ""
    multiply_adds: Optional[int] = None
    notes: Tuple[str, ...] = ()

    @property
    def on_gpu(self) -> bool:
        """Whether the network ran on a GPU."""
        return self.device.startswith("cuda")

    def facts(self) -> Dict[str, Any]:
        """What it is, as plain data."""
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ("step", "notes")}


class Race:
    """What ``race`` measured.

    Attributes:
        samples: case name -> round -> seconds of each call.
        warmup: case name -> calls made before anything was recorded.
        processor: case name -> round -> processor seconds per call, all threads together.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.samples: Dict[str, List[List[float]]] = {name: [] for name in names}
        self.warmup: Dict[str, int] = dict.fromkeys(names, 0)
        self.processor: Dict[str, List[float]] = {name: [] for name in names}

    def all(self, name: str) -> List[float]:
        """Seconds of every recorded call, in order."""
        return [s for turn in self.samples[name] for s in turn]

    def medians(self, name: str) -> np.ndarray:
        """Median seconds of each round."""
        return np.array([np.median(turn) for turn in self.samples[name]])

    def ratio(self, name: str, base: str) -> Dict[str, Any]:
        """How many times faster ``name`` is than ``base``; see ``judge``."""
        return judge(name, base, self.medians(base) / self.medians(name))

    def share_of_peak(self, case: Case, peak: Optional[Case]) -> Optional[float]:
        """Multiply-add rate over that of ``peak`` in the same rounds; None where either is unknown."""
        if peak is None or peak.multiply_adds is None or case.multiply_adds is None:
            return None
        if case.on_gpu or case.precision != "fp32":
            return None
        work = case.multiply_adds * case.batch / peak.multiply_adds
        return float(np.median(work * self.medians(peak.name) / self.medians(case.name)))


def judge(name: str, base: str, ratios: Sequence[float]) -> Dict[str, Any]:
    """What the ratios of the rounds allow to conclude.

    Args:
        name: the case.
        base: what it is compared with.
        ratios: of each round the median time of ``base`` over that of ``name``.

    Returns:
        ``speedup`` (median), ``low`` and ``high`` (10th and 90th percentile), ``rounds``, ``verdict``
        (``"faster"``, ``"slower"``, ``"equal"``: the range holds 1 and is narrow, or
        ``"inconclusive"``) and ``warning``, empty if nothing keeps the figure from being trusted.
    """
    ratio, low, high = (float(np.percentile(ratios, p)) for p in (50, 10, 90))
    wide, few = (high - low) / ratio > WIDE, len(ratios) < LEAST_ROUNDS
    if few or (low <= 1 <= high and wide):
        verdict = "inconclusive"
    elif low <= 1 <= high:
        verdict = "equal"
    else:
        verdict = "faster" if low > 1 else "slower"
    warning = ""
    if few:
        warning = f"only {len(ratios)} rounds: at least {LEAST_ROUNDS} are needed; give more --seconds"
    elif wide:
        doubt = "cannot tell which is faster"
        if verdict != "inconclusive":
            doubt = f"{verdict}, but by how much is uncertain"
        warning = (
            f"the spread {low:.2f}-{high:.2f} is too wide: {doubt}; close other programs, fix the clocks "
            "or give more --seconds"
        )
    found = {"name": name, "base": base, "speedup": ratio, "low": low, "high": high, "rounds": len(ratios)}
    return {**found, "verdict": verdict, "warning": warning}


def percentile(ordered: Sequence[float], p: float) -> float:
    """The ``p``-th percentile of ascending values, as trtexec picks it.

    ``ordered[max(n - 1 - int((1 - p / 100) * n), 0)]``, in single precision as trtexec computes it
    (TensorRT, samples/common/sampleReporting.cpp): for 10 values p90 is the second largest.
    """
    n = len(ordered)
    excluded = int((np.float32(1) - np.float32(p) / np.float32(100)) * np.float32(n))
    return ordered[max(n - 1 - excluded, 0)]


def summarise(seconds: Sequence[float]) -> Dict[str, float]:
    """Statistics of the durations of single calls, in milliseconds.

    ``trimmed_mean`` leaves out the fastest and the slowest tenth.

    Raises:
        UsageError: there are none.
    """
    if not len(seconds):
        raise UsageError("nothing was timed")
    ordered = sorted(1000.0 * s for s in seconds)
    cut = len(ordered) // 10
    return {
        "count": len(ordered),
        "mean": float(np.mean(ordered)),
        "median": float(np.median(ordered)),
        "trimmed_mean": float(np.mean(ordered[cut : len(ordered) - cut])),
        "min": ordered[0],
        "max": ordered[-1],
        **{f"p{p}": percentile(ordered, p) for p in (90, 95, 99)},
    }


def settle(longest: float = SETTLE_SECONDS) -> None:
    """Waits until no thread of this process works any more.

    The threads of a pool (ONNX Runtime's, OpenMP's) go on looking for work for some milliseconds after
    a call. On as many processors as one case has threads, the next one's first calls would share them
    with threads that do nothing.
    """
    end = perf_counter() + longest
    while perf_counter() < end:
        began, used = perf_counter(), process_time()
        sleep(0.004)
        if process_time() - used < 0.1 * (perf_counter() - began):
            return


def race(
    cases: Sequence[Case],
    seconds: Optional[float],
    calls: int = 1000,
    warmup: int = 100,
    tick: Callable[[str], None] = lambda name: None,
    clock: Clock = perf_counter,
) -> Race:
    """Times cases in turns until each has made ``calls`` calls or the time is up.

    Warm-up comes first, of each case by itself, for at most a tenth of the time. A turn is as many
    calls as fit into ``TURN_SECONDS``. Before it the threads of the others come to rest; its first
    call wakes its own threads, pays for the caches that the others have filled and is not recorded.

    Args:
        cases: with distinct names; two or more for a comparison, one is allowed.
        seconds: time for everything; None to go on until all calls are made.
        calls: recorded calls per case.
        warmup: calls before that.
        tick: called with the case's name after every turn.
        clock: in seconds.
    """
    seen = Race([case.name for case in cases])
    began = clock()
    per_turn: Dict[str, int] = {}
    for case in cases:
        share = math.inf if seconds is None else 0.1 * seconds / len(cases)
        started = clock()
        times: List[float] = []
        while len(times) < max(2, warmup) and (len(times) < 2 or clock() - started < share):
            times.append(case.step.sample())
        seen.warmup[case.name] = len(times)
        per_turn[case.name] = max(1, int(min(TURN_SECONDS / max(1e-7, min(times)), calls // LEAST_ROUNDS)))
        tick(case.name)
    done = 0
    while True:
        for case in cases if done % 2 == 0 else cases[::-1]:
            step, count = case.step, per_turn[case.name]
            settle()
            step.sample()
            used = step.processor_seconds()
            seen.samples[case.name].append(step.turn(count))
            seen.processor[case.name].append((step.processor_seconds() - used) / count)
            tick(case.name)
        done += 1
        if all(done * count >= calls for count in per_turn.values()):
            return seen
        # A machine so busy that even the fewest rounds take far longer gets an inconclusive answer.
        if seconds is not None and clock() - began > seconds * (1 if done >= LEAST_ROUNDS else 1.5):
            return seen
