"""Statistics against cases computed by hand, and races under a simulated clock."""

from __future__ import annotations

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed.race import LEAST_ROUNDS, Case, compare, judge, race, summarise, timed


class World:
    """A simulated clock that only the calls advance; ``slowdown`` of the machine affects all cases."""

    def __init__(self, slowdown=lambda now: 1.0):
        self.now = 0.0
        self.slowdown = slowdown

    @property
    def seconds(self):
        return {"all": self.now}

    def case(self, name, seconds):
        def call():
            self.now += seconds * self.slowdown(self.now)

        return Case(name, timed(call, lambda: self.now))

    def race(self, cases, seconds, calls=10**6, warmup=100):
        return race(cases, seconds, calls, warmup, clock=lambda: self.now)


def test_a_race_finds_the_ratio_although_the_machine_changes_speed():
    # Three times slower in the second half: timed one after the other, the cases would give a wrong ratio.
    world = World(lambda now: 3.0 if now > 5 else 1.0)
    seen = world.race([world.case("a", 0.010), world.case("b", 0.005)], 10)
    (ratio,) = compare("P2", seen, "a")
    assert (ratio["name"], ratio["base"], ratio["verdict"], ratio["warning"]) == ("b", "a", "faster", "")
    assert (ratio["low"], ratio["speedup"], ratio["high"]) == pytest.approx((2, 2, 2), rel=0.05)
    assert compare("P2", seen, "b")[0]["verdict"] == "slower"
    world = World(lambda now: 1 + now)  # ever slower: the order of the cases alternates
    assert compare("P2", world.race([world.case("a", 0.01), world.case("b", 0.01)], 20), "a")[0]["verdict"] == "equal"


@pytest.mark.parametrize(
    ("ratios", "verdict", "warns"),
    [
        (np.linspace(1.0, 3.0, 9), "faster", True),
        ([0.98] * 2 + [1.05] * 7, "equal", False),
        (np.linspace(0.6, 1.6, 9), "inconclusive", True),
        ([2.0] * (LEAST_ROUNDS - 1), "inconclusive", True),
    ],
)
def test_verdicts(ratios, verdict, warns):
    found = judge(ratios)
    assert found["verdict"] == verdict and bool(found["warning"]) == warns


def test_without_a_time_limit_all_calls_are_made_and_the_first_of_a_turn_is_not_recorded():
    world = World()
    case = world.case("a", 0.0002)
    case.subject = world
    turns = world.race([case], None, calls=100, warmup=7)["a"]
    recorded = sum(map(len, turns))
    assert recorded >= 100 and world.now == pytest.approx(0.0002 * (7 + recorded + len(turns)))
    assert case.stages["all"] == pytest.approx(0.0002 * recorded) and len(turns) == LEAST_ROUNDS
    assert [*summarise(np.arange(101) / 1000).values()] == pytest.approx([101, 50, 0, 50, 90, 95, 99, 100])


def test_a_hopelessly_busy_machine_ends_in_time_without_a_conclusion():
    world = World()
    seen = world.race([world.case("a", 4.0), world.case("b", 2.0)], 10, 1000)
    assert world.now < 40 and compare("P2", seen, "a")[0]["verdict"] == "inconclusive"
