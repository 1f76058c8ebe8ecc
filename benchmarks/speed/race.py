"""Timing that is robust on a noisy machine: cases take turns, and each round gives its own ratios.

Other programs, clocks and temperature change the speed of a machine. Here cases take turns in short bursts, in the
opposite order every other round: whatever slows the machine down slows all cases of a round, so the ratio within
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
#: A comparison needs at least this many rounds.
LEAST_ROUNDS = 5
#: If the middle 80 % of the ratios spread wider than this share of their median, the ratio is not reliable.
WIDE = 0.20

Clock = Callable[[], float]
#: Case name -> round -> seconds of each call.
Turns = Dict[str, List[List[float]]]


@dataclass
class Case:
    """One thing to measure: how to run it, and what is reported with its figures."""

    name: str  # short and unique in a run
    run: Callable[[int], List[float]]  # makes this many calls; returns each call's seconds until its result is there
    close: Callable[[], object] = lambda: None
    subject: Any = None  # the tracker whose ``update`` is called, if it is one of this package's
    #: For an asynchronous device: makes this many calls and waits once, after the last; returns the total seconds.
    burst: Optional[Callable[[int], float]] = None
    tracker: str = ""  # "AsymTrack-T", or the name of another tracker
    backend: str = ""  # one of names.BACKENDS, or "torch", "opencv", ...
    device: str = "cpu"  # where the network ran: "cpu", "cuda:0" or "server"
    precision: str = ""  # empty if unknown
    threads: Optional[int] = None  # None: the runtime's own choice
    batch: int = 1  # targets in one call
    model_sha256: str = ""  # of the search network's file
    notes: Tuple[str, ...] = ()  # what a reader must know about these figures
    stages: Dict[str, float] = field(default_factory=dict, init=False)  # seconds by stage, over all recorded calls

    def turn(self, calls: int) -> List[float]:
        """Makes some recorded calls and returns the seconds of each; adds the subject's stages to ``stages``."""
        before = self.subject.seconds if self.subject else {}
        seconds = self.run(calls)
        for name, began in before.items():
            self.stages[name] = self.stages.get(name, 0.0) + self.subject.seconds[name] - began
        return seconds

    def facts(self) -> Dict[str, Any]:
        ways = ("run", "close", "subject", "burst", "notes", "stages")
        return {f.name: getattr(self, f.name) for f in fields(self) if f.name not in ways}


def timed(call: Callable[[], object], clock: Clock = perf_counter) -> Callable[[int], List[float]]:
    """A ``Case.run`` that times a call which returns when its work is done."""

    def run(calls: int) -> List[float]:
        seconds = []
        for _ in range(calls):
            began = clock()
            call()
            seconds.append(clock() - began)
        return seconds

    return run


def compare(protocol: str, seen: Turns, base: str) -> List[Dict[str, Any]]:
    """How many times faster each other case is than ``base``, and whether the ratios of the rounds prove it.

    Returns ``protocol``, ``name``, ``base``, ``speedup`` (median), ``low`` and ``high`` (10th and 90th percentile),
    ``rounds``, ``verdict`` (``"faster"``, ``"slower"``, ``"equal"`` if the range is narrow and contains 1, or
    ``"inconclusive"``) and ``warning``, which is empty if the figure can be trusted.
    """
    medians = {name: np.array([np.median(turn) for turn in turns]) for name, turns in seen.items()}
    return [
        {"protocol": protocol, "name": name, "base": base, **judge(medians[base] / medians[name])}
        for name in seen
        if name != base
    ]


def judge(ratios: Sequence[float]) -> Dict[str, Any]:
    """The figures and the verdict of ``compare``, from the ratios of the rounds."""
    low, ratio, high = (float(value) for value in np.percentile(ratios, (10, 50, 90)))
    wide, few = (high - low) / ratio > WIDE, len(ratios) < LEAST_ROUNDS
    verdict, warning = "faster" if low > 1 else "slower", ""
    if low <= 1 <= high or few:
        verdict = "inconclusive" if wide or few else "equal"
    if few:
        warning = f"only {len(ratios)} rounds: at least {LEAST_ROUNDS} are needed; give more --seconds"
    elif wide:
        advice = "close other programs, fix the clocks or give more --seconds"
        warning = f"the spread {low:.2f}-{high:.2f} is too wide for a reliable ratio: {advice}"
    return {"speedup": ratio, "low": low, "high": high, "rounds": len(ratios), "verdict": verdict, "warning": warning}


def summarise(seconds: Sequence[float]) -> Dict[str, float]:
    """Statistics of single calls in milliseconds."""
    parts = {"min": 0, "median": 50, "p90": 90, "p95": 95, "p99": 99, "max": 100}
    found = {name: float(value) for name, value in zip(parts, np.percentile(seconds, [*parts.values()]) * 1000)}
    return {"count": len(seconds), "mean": 1000 * float(np.mean(seconds)), **found}


def settle() -> None:
    """Waits until all threads of this process are idle.

    The threads of a pool (ONNX Runtime's, OpenMP's) spin for some milliseconds after a call, waiting for work. They
    would take processor time from the next case.
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
    """Times cases in turns until each has made ``calls`` calls or ``seconds`` are over (None: no time limit).

    First each case warms up by itself; warm-up takes at most a tenth of the ``seconds`` in all. A turn has as many
    calls as fit into ``TURN_SECONDS``. Before a turn, the threads of the other cases become idle. The first call of a
    turn is not recorded: it wakes the case's own threads and refills the caches. After a turn, ``tick`` is called
    with the case's name.
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
        # If even LEAST_ROUNDS take far too long on a busy machine, the race ends and is inconclusive.
        if seconds is not None and clock() - began > seconds * (1 if rounds >= LEAST_ROUNDS else 1.5):
            return seen
