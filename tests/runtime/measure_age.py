"""How old is the frame a slow tracker gets? ``python -m tests.runtime.measure_age [--model T]``.

A simulated camera of 60 frames a second, a tracker slowed to 20: prints the age of the frames when
they are handed to it, how many were dropped, and what memory gained. The aim is two camera periods.
"""

from __future__ import annotations

import argparse
import resource
from time import monotonic, sleep
from typing import List

import numpy as np

from asymtrack_edge.runtime import Tracker
from asymtrack_edge.runtime.sources import LiveSource
from asymtrack_edge.runtime.sources.reader import Reader
from tests.runtime.simulated import FakeCapture

CAMERA, TRACKER = 60, 20


def _memory() -> int:
    """Peak resident memory in KB."""
    return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def main() -> int:
    """Prints the figures; 1 if more than one frame in a hundred was older than two periods."""
    parser = argparse.ArgumentParser(prog="python -m tests.runtime.measure_age", description=__doc__)
    parser.add_argument("--model", help="also track with this model: its update() takes part of the 50 ms")
    parser.add_argument("--seconds", type=float, default=15)
    arguments = parser.parse_args()
    tracker = Tracker.load(arguments.model, threads=1) if arguments.model else None
    reader = Reader(LiveSource("simulated", lambda: FakeCapture(CAMERA, size=(1280, 720))))
    ages: List[float] = []
    memory = 0
    with reader:
        first = next(reader).image
        if tracker is not None:
            tracker.init(first, (600, 320, 80, 80))
        end = monotonic() + arguments.seconds
        while monotonic() < end:
            frame = next(reader)
            began = monotonic()
            ages.append(1000 * frame.age)
            if tracker is not None:
                tracker.update(frame.image)
            sleep(max(0.0, 1 / TRACKER - (monotonic() - began)))
            memory = memory if len(ages) > 20 else _memory()
    median, high, highest = np.percentile(ages, (50, 95, 99))
    limit = 2000 / CAMERA
    print(
        f"{len(ages)} decisions: age {median:.1f} ms in the median, {high:.1f} at the 95th percentile, "
        f"{highest:.1f} at the 99th, {max(ages):.1f} at most; two periods are {limit:.1f}; "
        f"{reader.stats.dropped} of {reader.stats.received} frames dropped; memory +{_memory() - memory} KB"
    )
    return int(highest >= limit)


if __name__ == "__main__":
    raise SystemExit(main())
