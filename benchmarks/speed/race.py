"""Timing that survives a noisy machine: cases take turns, and ratios are drawn round by round.

Other programs, clocks and temperature change the speed of a machine. Here cases take turns in short bursts, in the
opposite order every other round: what slows the machine down slows all cases of a round, so that the ratio within
the round holds. The spread of the ratios says how far the result can be trusted.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, field, fields
from time import perf_counter, process_time, sleep
from typing import Any, Callable, Dict, List, Optional, Sequence, Tuple

import numpy as np

#: Seconds that one case runs before the next one's turn.
TURN_SECONDS = 0.1
#: Longest wait for the other cases' threads before a turn, in seconds.
SETTLE_SECONDS = 0.1
#: Fewest rounds a comparison is drawn from.
LEAST_ROUNDS = 5
#: A middle-80-% range of ratios wider than this share of their median cannot size a difference.
WIDE = 0.20

Clock = Callable[[], float]
#: Case name -> round -> seconds of each call.
Turns = Dict[str, List[List[float]]]


@dataclass
class Case:
    """One thing that is measured: how to run it, and what is printed with its figures."""

    name: str  # short and unique in a run
    run: Callable[[int], List[float]]  # makes so many calls; seconds until the result of each was there
    close: Callable[[], object] = lambda: None
    subject: Any = None  # the tracker whose ``update`` is called, where it is one of this package's
    #: Where a device works on its own: makes so many calls and waits once, after the last; seconds of all.
    burst: Optional[Callable[[int], float]] = None
    tracker: str = ""  # "AsymTrack-T" or the name of somebody else's
    backend: str = ""  # of cli.BACKENDS, or "torch", "opencv", ...
    device: str = "cpu"  # or "cuda:0" or "server": where the network ran
    precision: str = ""  # where somebody says
    threads: Optional[int] = None  # None: the runtime's own choice
    batch: int = 1  # targets in one call
    model_sha256: str = ""  # of the search network's file, or of the weights in memory
    notes: Tuple[str, ...] = ()  # what a reader must know of these figures
    stages: Dict[str, float] = field(default_factory=dict, init=False)  # seconds by stage of all recorded calls

    def turn(self, calls: int) -> List[float]:
        """Seconds of each of some recorded calls, one after the other; those of a subject's stages are added up."""
        before = self.subject.seconds if self.subject else {}
        seconds = self.run(calls)
        for name, began in before.items():
            self.stages[name] = self.stages.get(name, 0.0) + self.subject.seconds[name] - began
        return seconds

    def facts(self) -> Dict[str, Any]:
        ways = ("run", "close", "subject", "burst", "notes", "stages")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ways}


def timed(call: Callable[[], object], clock: Clock = perf_counter) -> Callable[[int], List[float]]:
    """A ``Case.run`` of a call that returns when its work is done."""

    def run(calls: int) -> List[float]:
        seconds = []
        for _ in range(calls):
            began = clock()
            call()
            seconds.append(clock() - began)
        return seconds

    return run


def compare(protocol: str, seen: Turns, base: str) -> List[Dict[str, Any]]:
    """How many times faster each other case is than ``base``, and what the ratios of the rounds allow to conclude.

    Returns ``protocol``, ``name``, ``base``, ``speedup`` (median), ``low`` and ``high`` (10th and 90th percentile),
    ``rounds``, ``verdict`` (``"faster"``, ``"slower"``, ``"equal"``: the range holds 1 and is narrow, or
    ``"inconclusive"``) and ``warning``, empty if nothing keeps the figure from being trusted.
    """
    medians = {name: np.array([np.median(turn) for turn in turns]) for name, turns in seen.items()}
    return [
        {"protocol": protocol, "name": name, "base": base, **judge(medians[base] / medians[name])}
        for name in seen
        if name != base
    ]


def judge(ratios: Sequence[float]) -> Dict[str, Any]:
    """The figures and the verdict of ``compare`` from the ratios of the rounds."""
    low, ratio, high = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    wide, few = (high - low) / ratio > WIDE, len(ratios) < LEAST_ROUNDS
    verdict, warning = "faster" if low > 1 else "slower", ""
    if low <= 1 <= high or few:
        verdict = "inconclusive" if wide or few else "equal"
    if few:
        warning = f"only {len(ratios)} rounds: at least {LEAST_ROUNDS} are needed; give more --seconds"
    elif wide:
        advice = "close other programs, fix the clocks or give more --seconds"
        warning = f"the spread {low:.2f}-{high:.2f} is too wide to size the difference: {advice}"
    return {"speedup": ratio, "low": low, "high": high, "rounds": len(ratios), "verdict": verdict, "warning": warning}


def summarise(seconds: Sequence[float]) -> Dict[str, float]:
    """Statistics of single calls in milliseconds."""
    parts = {"min": 0, "median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    found = {name: float(value) for name, value in zip(parts, np.percentile(seconds, [*parts.values()]) * 1000)}
    return {"count": len(seconds), "mean": 1000 * float(np.mean(seconds)), **found}


def settle() -> None:
    """Waits until no thread of this process works any more.

    The threads of a pool (ONNX Runtime's, OpenMP's) go on looking for work for some milliseconds after a call. The
    next case would share the processors with threads that do nothing.
    """
    end = perf_counter() + SETTLE_SECONDS
    while perf_counter() < end:
        began, used = perf_counter(), process_time()
        sleep(0.004)
        if process_time() - used < 0.1 * (perf_counter() - began):
            return


def race(
    cases: Sequence[Case],
    seconds: Optional[float],
    calls: int,
    warmup: int,
    tick: Callable[[str], None] = lambda name: None,
    clock: Clock = perf_counter,
) -> Turns:
    """Times cases in turns until each has made ``calls`` calls or the time is up.

    Warm-up comes first, of each case by itself, for at most a tenth of the ``seconds`` (None: until all calls are
    made). A turn is as many calls as fit into ``TURN_SECONDS``. Before it the threads of the others come to rest; its
    first call wakes its own threads, pays for the caches that the others have filled and is not recorded. After it
    ``tick`` is called with the case's name.
    """
    began = clock()
    per_turn: Dict[str, int] = {}
    for case in cases:
        share = math.inf if seconds is None else 0.1 * seconds / len(cases)
        started = clock()
        times: List[float] = []
        while len(times) < max(2, warmup) and (len(times) < 2 or clock() - started < share):
            times += case.run(1)
        per_turn[case.name] = max(1, int(min(TURN_SECONDS / max(1e-7, min(times)), calls // LEAST_ROUNDS)))
        tick(case.name)
    seen: Turns = {case.name: [] for case in cases}
    rounds = 0
    while True:
        for case in cases if rounds % 2 == 0 else cases[::-1]:
            settle()
            case.run(1)
            seen[case.name].append(case.turn(per_turn[case.name]))
            tick(case.name)
        rounds += 1
        if all(rounds * count >= calls for count in per_turn.values()):
            return seen
        # A machine so busy that even the fewest rounds take far longer gets an inconclusive answer.
        if seconds is not None and clock() - began > seconds * (1 if rounds >= LEAST_ROUNDS else 1.5):
            return seen
