"""Statistics of durations, and interleaved comparisons that survive a noisy machine.

Other programs, clocks and temperature change the speed of a machine from one second to the next.
Measured one after the other, two candidates are compared under different conditions. Here they take
turns in short bursts, in the opposite order every other round, and each round gives one ratio: what
slows the machine down slows both. The spread of these ratios says how far the answer can be trusted.
(Of a steady drift a fixed order would favour one side; in the opposite order the next round favours
the other, and the median over the rounds neither.)
"""

from __future__ import annotations

import math
from abc import ABC, abstractmethod
from dataclasses import dataclass
from time import perf_counter, process_time, sleep
from typing import Callable, Dict, List, Mapping, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.benchmarks.speed.ratios import LEAST_ROUNDS, Ratio, judge, speedup
from asymtrack_edge.errors import UsageError

#: Seconds that one candidate runs before the next one's turn.
TURN_SECONDS = 0.1
#: Longest wait for the other candidates' threads before a turn, in seconds.
SETTLE_SECONDS = 0.1

Clock = Callable[[], float]


class Step(ABC):
    """Something that is timed call by call.

    Attributes:
        queues: whether ``burst`` is more than its calls one by one.
    """

    queues = False

    @abstractmethod
    def sample(self) -> float:
        """Makes one call and returns how long it took until its result was there, in seconds."""

    def burst(self, calls: int) -> float:
        """Makes calls back to back, waiting for a device only after the last; seconds in all."""
        return sum(self.sample() for _ in range(calls))

    def turn(self, calls: int) -> List[float]:
        """Seconds of each of some calls, one after the other."""
        return [self.sample() for _ in range(calls)]

    def processor_seconds(self) -> float:
        """Processor time that the step's process has used so far, all threads together."""
        return process_time()

    def close(self) -> None:  # noqa: B027  (most steps hold nothing)
        """Gives back what the step holds."""


class CallStep(Step):
    """Times a function that returns when its work is done."""

    def __init__(self, call: Callable[[], object], clock: Clock = perf_counter) -> None:
        self._call = call
        self._clock = clock

    def sample(self) -> float:
        """See ``Step.sample``."""
        began = self._clock()
        self._call()
        return self._clock() - began


def percentile(ordered: Sequence[float], p: float) -> float:
    """The ``p``-th percentile of ascending values, as trtexec picks it.

    ``ordered[max(n - 1 - int((1 - p / 100) * n), 0)]``, in single precision as trtexec computes it
    (TensorRT, samples/common/sampleReporting.cpp): for 10 values p90 is the second largest.
    """
    n = len(ordered)
    if not n:
        raise UsageError("a percentile needs at least one value")
    excluded = int((np.float32(1) - np.float32(p) / np.float32(100)) * np.float32(n))
    return ordered[max(n - 1 - excluded, 0)]


@dataclass(frozen=True)
class Summary:
    """Statistics of the durations of single calls, in milliseconds.

    ``trimmed_mean`` leaves out the fastest and the slowest tenth.
    """

    count: int
    mean: float
    median: float
    trimmed_mean: float
    std: float
    min: float
    max: float
    p90: float
    p95: float
    p99: float


def summarise(seconds: Sequence[float]) -> Summary:
    """Statistics of durations given in seconds.

    Raises:
        UsageError: there are none.
    """
    if not len(seconds):
        raise UsageError("nothing was timed")
    ordered = sorted(1000.0 * s for s in seconds)
    n = len(ordered)
    middle = ordered[n // 2] if n % 2 else 0.5 * (ordered[n // 2 - 1] + ordered[n // 2])
    cut = n // 10
    kept = ordered[cut : n - cut]
    mean = sum(ordered) / n
    return Summary(
        count=n,
        mean=mean,
        median=middle,
        trimmed_mean=sum(kept) / len(kept),
        std=math.sqrt(sum((v - mean) ** 2 for v in ordered) / n),
        min=ordered[0],
        max=ordered[-1],
        p90=percentile(ordered, 90),
        p95=percentile(ordered, 95),
        p99=percentile(ordered, 99),
    )


class Rounds:
    """What ``interleave`` measured: per candidate and round the seconds of each call.

    Attributes:
        samples: name -> round -> seconds of each call.
        warmup: name -> calls made before anything was recorded.
        processor: name -> round -> processor seconds of the candidate's process per call, all threads together.
    """

    def __init__(self, names: Sequence[str]) -> None:
        self.samples: Dict[str, List[List[float]]] = {name: [] for name in names}
        self.warmup: Dict[str, int] = dict.fromkeys(names, 0)
        self.processor: Dict[str, List[float]] = {name: [] for name in names}

    def all(self, name: str) -> List[float]:
        """Every recorded call of a candidate, in order."""
        return [s for turn in self.samples[name] for s in turn]

    def medians(self, name: str) -> List[float]:
        """Median seconds of each round."""
        return [float(np.median(turn)) for turn in self.samples[name]]

    def compare(self, name: str, base: str) -> Ratio:
        """How much faster ``name`` is than ``base``, from the rounds' medians."""
        times = speedup(self.samples[base], self.samples[name])
        return judge(name, base, times, len(self.samples[name]))


def settle(longest: float = SETTLE_SECONDS) -> None:
    """Waits until no thread of this process works any more.

    The threads of a pool (ONNX Runtime's, OpenMP's) go on looking for work for some milliseconds after
    a call. On as many processors as one candidate has threads, the next one's first
    calls would share them with threads that do nothing.
    """
    end = perf_counter() + longest
    while perf_counter() < end:
        began, used = perf_counter(), process_time()
        sleep(0.004)
        if process_time() - used < 0.1 * (perf_counter() - began):
            return


def interleave(
    steps: Mapping[str, Step],
    seconds: Optional[float],
    calls: int = 1000,
    warmup: int = 100,
    tick: Callable[[str], None] = lambda note: None,
    clock: Clock = perf_counter,
) -> Rounds:
    """Times candidates in turns until each has made ``calls`` calls or the time is up.

    Warm-up comes first, of each candidate by itself, for at most a tenth of the time. A turn is as
    many calls as fit into ``TURN_SECONDS``. Before it the threads of the others come to rest; its first
    call wakes its own threads, pays for the caches that the others have filled and is not recorded.

    Args:
        steps: by name, two or more for a comparison, one is allowed.
        seconds: time for everything; None to go on until all calls are made.
        calls: recorded calls per candidate.
        warmup: calls before that.
        tick: called with a note after every turn.
        clock: in seconds.
    """
    names = list(steps)
    rounds = Rounds(names)
    began = clock()
    estimate: Dict[str, float] = {}
    for name in names:
        share = math.inf if seconds is None else 0.1 * seconds / len(names)
        started = clock()
        times: List[float] = []
        while len(times) < max(2, warmup) and (len(times) < 2 or clock() - started < share):
            times.append(steps[name].sample())
        rounds.warmup[name] = len(times)
        estimate[name] = max(1e-7, min(times))
        tick(f"warm-up {name}")
    per_turn = {n: max(1, int(min(TURN_SECONDS / estimate[n], calls // LEAST_ROUNDS))) for n in names}
    done = 0
    while True:
        order = names if done % 2 == 0 else names[::-1]
        for name in order:
            step = steps[name]
            settle()
            step.sample()
            used = step.processor_seconds()
            rounds.samples[name].append(step.turn(per_turn[name]))
            rounds.processor[name].append((step.processor_seconds() - used) / per_turn[name])
            tick(name)
        done += 1
        if all(done * per_turn[n] >= calls for n in names):
            break
        # A machine so busy that even the fewest rounds take far longer gets an inconclusive answer.
        spent = clock() - began
        if seconds is not None and spent > seconds * (1 if done >= LEAST_ROUNDS else 1.5):
            break
    return rounds


def timed_loop(
    step: Step, seconds: float, least_calls: int, warmup_seconds: float, clock: Clock = perf_counter
) -> Tuple[List[float], float]:
    """Times one candidate by the clock, as trtexec does: warm-up, then calls for ``seconds``.

    Returns:
        Seconds of each call, and of the whole timed part.
    """
    began = clock()
    while clock() - began < warmup_seconds:
        step.sample()
    samples: List[float] = []
    began = clock()
    while clock() - began < seconds or len(samples) < least_calls:
        samples.append(step.sample())
    return samples, clock() - began
