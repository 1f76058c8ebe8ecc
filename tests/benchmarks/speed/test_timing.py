"""Statistics by hand-computed cases, and the A/B logic under a clock that obeys."""

from __future__ import annotations

from threading import Event, Thread
from time import perf_counter, process_time, sleep
from typing import Callable, Dict, List

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed.ratios import LEAST_ROUNDS, judge, speedup
from asymtrack_edge.benchmarks.speed.timing import (
    CallStep,
    Rounds,
    Step,
    interleave,
    percentile,
    settle,
    summarise,
    timed_loop,
)
from asymtrack_edge.errors import UsageError


class World:
    """A clock that only the steps move; ``slowdown`` is what the machine does to everybody."""

    def __init__(self, slowdown: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.slowdown = slowdown

    def clock(self) -> float:
        return self.now

    def step(self, seconds: float) -> Step:
        def call() -> None:
            self.now += seconds * self.slowdown(self.now)

        return CallStep(call, self.clock)


@pytest.mark.parametrize(
    ("count", "p", "index"),
    # trtexec: sorted[max(n - 1 - int((1 - p / 100) * n), 0)] in single precision.
    [(10, 90, 8), (100, 99, 99), (100, 90, 89), (1000, 99, 990), (1, 99, 0), (3, 50, 1), (4, 0, 0)],
)
def test_percentiles_are_those_of_trtexec(count: int, p: float, index: int) -> None:
    assert percentile(list(range(count)), p) == index


def test_percentile_of_nothing_is_refused() -> None:
    with pytest.raises(UsageError):
        percentile([], 50)


def test_summary_in_milliseconds() -> None:
    seconds = [0.001 * v for v in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)]
    s = summarise(seconds)
    assert (s.count, s.min, s.max) == (10, pytest.approx(1), pytest.approx(100))
    assert s.mean == pytest.approx(14.5)
    assert s.median == pytest.approx(5.5)
    # The trimmed mean leaves out the tenth at either end: 1 and 100.
    assert s.trimmed_mean == pytest.approx(np.mean(range(2, 10)))
    assert s.p90 == pytest.approx(9)
    assert s.std == pytest.approx(np.std([1, 2, 3, 4, 5, 6, 7, 8, 9, 100]))
    with pytest.raises(UsageError):
        summarise([])


def test_interleaving_finds_the_ratio_though_the_machine_changes_speed() -> None:
    # Three times slower in the second half: sequential timing would be off by far.
    world = World(lambda now: 3.0 if now > 5 else 1.0)
    rounds = interleave({"a": world.step(0.010), "b": world.step(0.005)}, 10, 10**6, clock=world.clock)
    ratio = rounds.compare("b", "a")
    assert ratio.speedup == pytest.approx(2, rel=0.01)
    assert ratio.low == pytest.approx(2, rel=0.05) and ratio.high == pytest.approx(2, rel=0.05)
    assert ratio.verdict == "faster" and not ratio.warning
    assert rounds.compare("a", "b").verdict == "slower"


def test_noise_on_one_side_widens_the_spread_and_warns() -> None:
    random = np.random.RandomState(0)
    world = World()
    steady = world.step(0.01)

    def noisy() -> None:
        world.now += 0.01 * random.choice((0.4, 2.5))

    rounds = interleave({"a": steady, "b": CallStep(noisy, world.clock)}, 3, 10**6, clock=world.clock)
    # Medians of a turn still jump between the two speeds.
    ratio = rounds.compare("b", "a")
    assert ratio.low < 1 < ratio.high
    assert ratio.verdict == "inconclusive" and "cannot tell" in ratio.warning


def test_equal_candidates_are_called_equal() -> None:
    world = World()
    rounds = interleave({"a": world.step(0.01), "b": world.step(0.01)}, 2, 10**6, clock=world.clock)
    ratio = rounds.compare("b", "a")
    assert ratio.verdict == "equal" and ratio.speedup == pytest.approx(1)


@pytest.mark.parametrize(
    ("times", "rounds", "verdict", "warns"),
    [
        ((2.0, 1.95, 2.05), 9, "faster", False),
        ((2.0, 1.2, 2.8), 9, "faster", True),
        ((0.5, 0.49, 0.51), 9, "slower", False),
        ((1.0, 0.97, 1.03), 9, "equal", False),
        ((1.1, 0.7, 1.6), 9, "inconclusive", True),
        ((2.0, 1.95, 2.05), LEAST_ROUNDS - 1, "inconclusive", True),
    ],
)
def test_verdicts(times: tuple, rounds: int, verdict: str, warns: bool) -> None:
    ratio = judge("a", "b", times, rounds)
    assert ratio.verdict == verdict
    assert bool(ratio.warning) == warns


def test_all_calls_are_made_without_a_time_limit_and_the_first_of_a_turn_is_not_recorded() -> None:
    world = World()
    made: Dict[str, int] = {"a": 0}

    def call() -> None:
        made["a"] += 1
        world.now += 0.02

    rounds = interleave({"a": CallStep(call, world.clock)}, None, calls=100, warmup=7, clock=world.clock)
    recorded = len(rounds.all("a"))
    assert recorded >= 100
    assert rounds.warmup["a"] == 7
    assert made["a"] == 7 + recorded + len(rounds.samples["a"])


def test_turns_change_their_order_every_round() -> None:
    order: List[str] = []
    world = World()
    interleave({"a": world.step(0.05), "b": world.step(0.05)}, 2, 10**6, warmup=0, tick=order.append, clock=world.clock)
    turns = [note for note in order if not note.startswith("warm-up")]
    assert turns[:4] == ["a", "b", "b", "a"]


def test_a_hopelessly_busy_machine_ends_in_time_without_a_conclusion() -> None:
    world = World()
    rounds = interleave({"a": world.step(4.0), "b": world.step(2.0)}, 10, 1000, clock=world.clock)
    assert world.now < 40
    assert rounds.compare("b", "a").verdict == "inconclusive"


def test_timed_loop_warms_up_by_the_clock_and_makes_the_least_number_of_calls() -> None:
    world = World()
    samples, wall = timed_loop(world.step(0.1), seconds=0.25, least_calls=10, warmup_seconds=0.2, clock=world.clock)
    assert len(samples) == 10 and wall == pytest.approx(1.0)
    assert world.now == pytest.approx(1.2)


def test_a_turn_begins_when_the_threads_of_the_other_have_come_to_rest() -> None:
    spinning_until = [0.0]
    late: List[float] = []

    def spin() -> None:
        while perf_counter() < spinning_until[0]:
            pass

    def with_a_pool() -> None:
        spinning_until[0] = perf_counter() + 0.03
        Thread(target=spin).start()

    def alone() -> None:
        late.append(spinning_until[0] - perf_counter())

    interleave({"pool": CallStep(with_a_pool), "alone": CallStep(alone)}, 2, calls=5, warmup=1)
    first_of_turns = late[2::2]
    assert first_of_turns and np.median(first_of_turns) < 0


def test_waiting_for_rest_ends_though_a_thread_never_rests() -> None:
    stop = Event()
    thread = Thread(target=lambda: [None for _ in iter(stop.is_set, True)])
    thread.start()
    try:
        began = perf_counter()
        settle(0.05)
        assert 0.05 <= perf_counter() - began < 5
    finally:
        stop.set()
        thread.join()


def test_processor_time_is_that_of_work_not_of_waiting() -> None:
    def work() -> None:
        end = process_time() + 0.01
        while process_time() < end:
            pass

    rounds = interleave({"wait": CallStep(lambda: sleep(0.01)), "work": CallStep(work)}, 0.5, 20, warmup=1)
    wait, busy = np.median(rounds.processor["wait"]), np.median(rounds.processor["work"])
    assert wait < 0.005 and busy >= 0.01
    assert np.median(rounds.all("wait")) >= 0.01


def test_rounds_keep_every_call_in_order() -> None:
    rounds = Rounds(["a"])
    rounds.samples["a"] = [[1.0, 3.0, 2.0], [5.0]]
    assert rounds.all("a") == [1, 3, 2, 5]
    assert rounds.medians("a") == [2, 5]


def test_speedup_compares_the_medians_of_each_round() -> None:
    base, other = [[2.0, 9.0, 1.0], [4.0], [6.0]], [[1.0], [1.0], [1.0, 2.0, 9.0]]
    ratio, low, high = speedup(base, other)
    assert ratio == pytest.approx(3) and low == pytest.approx(2.2) and high == pytest.approx(3.8)
    assert speedup(base, base) == (1, 1, 1)
