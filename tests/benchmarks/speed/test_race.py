"""Statistics by hand-computed cases, and races under a clock that obeys."""

from __future__ import annotations

from threading import Event, Thread
from time import perf_counter, process_time, sleep
from typing import Any, Callable, List, Sequence

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed.race import (
    LEAST_ROUNDS,
    Case,
    Race,
    Step,
    judge,
    percentile,
    race,
    settle,
    summarise,
)
from asymtrack_edge.errors import UsageError


class World:
    """A clock that only the steps move; ``slowdown`` is what the machine does to everybody."""

    def __init__(self, slowdown: Callable[[float], float] = lambda now: 1.0) -> None:
        self.now = 0.0
        self.slowdown = slowdown

    def clock(self) -> float:
        return self.now

    def case(self, name: str, seconds: float, factor: Callable[[], float] = lambda: 1.0) -> Case:
        def call() -> None:
            self.now += seconds * self.slowdown(self.now) * factor()

        return Case(name, Step(call, self.clock))

    def race(self, cases: Sequence[Case], seconds: Any, calls: int = 10**6, **more: Any) -> Race:
        return race(cases, seconds, calls, clock=self.clock, **more)


@pytest.mark.parametrize(
    ("count", "p", "index"),
    # trtexec: sorted[max(n - 1 - int((1 - p / 100) * n), 0)] in single precision.
    [(10, 90, 8), (100, 99, 99), (100, 90, 89), (1000, 99, 990), (1, 99, 0), (3, 50, 1), (4, 0, 0)],
)
def test_percentiles_are_those_of_trtexec(count: int, p: float, index: int) -> None:
    assert percentile(list(range(count)), p) == index


def test_summary_in_milliseconds() -> None:
    s = summarise([0.001 * v for v in (1, 2, 3, 4, 5, 6, 7, 8, 9, 100)])
    assert (s["count"], s["min"], s["max"]) == (10, pytest.approx(1), pytest.approx(100))
    assert s["mean"] == pytest.approx(14.5) and s["median"] == pytest.approx(5.5) and s["p90"] == pytest.approx(9)
    # The trimmed mean leaves out the tenth at either end: 1 and 100.
    assert s["trimmed_mean"] == pytest.approx(np.mean(range(2, 10)))
    with pytest.raises(UsageError):
        summarise([])


def test_a_race_finds_the_ratio_though_the_machine_changes_speed() -> None:
    # Three times slower in the second half: timed one after the other, they would be off by far.
    world = World(lambda now: 3.0 if now > 5 else 1.0)
    seen = world.race([world.case("a", 0.010), world.case("b", 0.005)], 10)
    ratio = seen.ratio("b", "a")
    assert ratio["speedup"] == pytest.approx(2, rel=0.01)
    assert ratio["low"] == pytest.approx(2, rel=0.05) and ratio["high"] == pytest.approx(2, rel=0.05)
    assert ratio["verdict"] == "faster" and not ratio["warning"]
    assert seen.ratio("a", "b")["verdict"] == "slower"


@pytest.mark.parametrize(
    ("ratios", "verdict", "warns"),
    [
        (np.linspace(1.94, 2.06, 9), "faster", False),
        (np.linspace(1.0, 3.0, 9), "faster", True),
        (np.linspace(0.49, 0.51, 9), "slower", False),
        (np.linspace(0.97, 1.03, 9), "equal", False),
        (np.linspace(0.6, 1.6, 9), "inconclusive", True),
        ([2.0] * (LEAST_ROUNDS - 1), "inconclusive", True),
    ],
)
def test_verdicts(ratios: Sequence[float], verdict: str, warns: bool) -> None:
    ratio = judge("a", "b", ratios)
    assert ratio["verdict"] == verdict and bool(ratio["warning"]) == warns


def test_ratios_compare_the_medians_of_each_round() -> None:
    seen = Race(["base", "other"])
    seen.samples = {"base": [[2.0, 9.0, 1.0], [4.0], [6.0]], "other": [[1.0], [1.0], [1.0, 2.0, 9.0]]}
    ratio = seen.ratio("other", "base")
    assert (ratio["speedup"], ratio["rounds"]) == (3, 3)
    assert (ratio["low"], ratio["high"]) == (pytest.approx(2.2), pytest.approx(3.8))
    assert seen.all("base") == [2, 9, 1, 4, 6]


def test_share_of_peak() -> None:
    world = World()
    peak, case = world.case("peak", 0.01), world.case("net", 0.005)
    peak.multiply_adds, case.multiply_adds, case.batch = 10**9, 125_000_000, 2
    seen = world.race([case, peak], None, 10)
    # 2 x 0.125 G in 5 ms is 50 G/s, half of what the product makes.
    assert seen.share_of_peak(case, peak) == pytest.approx(0.5)
    case.device = "cuda:0"
    assert seen.share_of_peak(case, peak) is None


def test_all_calls_are_made_without_a_time_limit_and_the_first_of_a_turn_is_not_recorded() -> None:
    world, made = World(), [0]

    def count() -> float:
        made[0] += 1
        return 1.0

    seen = world.race([world.case("a", 0.02, count)], None, calls=100, warmup=7)
    recorded = len(seen.all("a"))
    assert recorded >= 100 and seen.warmup["a"] == 7
    assert made[0] == 7 + recorded + len(seen.samples["a"])


def test_turns_change_their_order_every_round() -> None:
    order: List[str] = []
    world = World()
    world.race([world.case("a", 0.05), world.case("b", 0.05)], 2, warmup=0, tick=order.append)
    assert order[:6] == ["a", "b", "a", "b", "b", "a"]  # warm-up, then two rounds


def test_a_hopelessly_busy_machine_ends_in_time_without_a_conclusion() -> None:
    world = World()
    seen = world.race([world.case("a", 4.0), world.case("b", 2.0)], 10, 1000)
    assert world.now < 40 and seen.ratio("b", "a")["verdict"] == "inconclusive"


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

    race([Case("pool", Step(with_a_pool)), Case("alone", Step(alone))], 2, calls=5, warmup=1)
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

    seen = race([Case("wait", Step(lambda: sleep(0.01))), Case("work", Step(work))], 0.5, 20, warmup=1)
    wait, busy = np.median(seen.processor["wait"]), np.median(seen.processor["work"])
    assert wait < 0.005 and busy >= 0.01
    assert np.median(seen.all("wait")) >= 0.01
