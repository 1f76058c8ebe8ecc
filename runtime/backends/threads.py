"""How the CPU backends share processors among targets."""

from __future__ import annotations

import os


def processors() -> int:
    """Processors that this process may use."""
    try:
        return len(os.sched_getaffinity(0))
    except AttributeError:  # not on this system
        return os.cpu_count() or 1


def side_by_side(targets: int, threads: int) -> int:
    """How many of ``targets`` run side by side, one thread each; the rest use all threads one by one.

    Whole rounds of one target per thread, and a last one if it keeps most of the threads busy: an
    operator on many threads is about half as efficient as on one.
    """
    if targets == 1 or threads == 1:
        return 0
    rest = targets % threads
    return targets if 2 * rest > threads else targets - rest
