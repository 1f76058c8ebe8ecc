"""How a server does with 1 to 64 clients: ``python -m tests.runtime.measure_serving triton://HOST:PORT``.

Each client is a thread with a tracker and one target, and asks for its next frame as soon as it has the last
one's track: a load that no cameras make, so that the table shows the most that the server does.
"""

from __future__ import annotations

import argparse
from concurrent.futures import ThreadPoolExecutor
from time import perf_counter
from typing import List

import numpy as np

from asymtrack_edge.runtime.backends.triton import network_name
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from asymtrack_edge.runtime.tracker import Tracker
from tests.runtime.inference_servers import runs_and_requests


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address")
    parser.add_argument("--model", default="T")
    arguments = parser.parse_args()
    clip = list(synthetic_clip(21))

    def follow(tracker: Tracker) -> List[float]:
        times = []
        for frame, _ in clip[1:]:
            began = perf_counter()
            tracker.update(frame)
            times.append(perf_counter() - began)
        return times

    print("| clients | frames/s | ms per frame, median | 99 % | targets per run |")
    for count in (1, 2, 4, 8, 16, 32, 64):
        trackers = [Tracker.load(arguments.model, arguments.address, recover=False) for _ in range(count)]
        for tracker in trackers:
            tracker.init(*clip[0])
        search = network_name(trackers[0].backend.manifest, "search")
        before, began = runs_and_requests(arguments.address, search), perf_counter()
        with ThreadPoolExecutor(count) as pool:
            times = 1000 * np.concatenate(list(pool.map(follow, trackers)))
        rate = len(times) / (perf_counter() - began)
        runs, requests = (b - a for a, b in zip(before, runs_and_requests(arguments.address, search)))
        middle, slow = np.percentile(times, (50, 99))
        print(f"| {count} | {rate:.1f} | {middle:.1f} | {slow:.1f} | {requests / runs:.1f} |", flush=True)
        for tracker in trackers:
            tracker.close()


if __name__ == "__main__":
    main()
