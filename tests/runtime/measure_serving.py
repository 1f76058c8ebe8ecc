"""How a server does with 1 to 64 clients: ``python -m tests.runtime.measure_serving [triton://HOST:PORT]``.

Each client is a thread with a tracker and one target, and asks for its next frame as soon as it has the last
one's track: a load that no cameras make, so that the table shows the most that the server does. Without an
address a server is started here: Triton where ``$ASYMTRACK_TRITON`` names it, else the tests' small one.
"""

from __future__ import annotations

import argparse
import tempfile
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path
from time import perf_counter
from typing import List

import numpy as np

from asymtrack_edge.export.triton import write_repository
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.backends.loading import model_folder
from asymtrack_edge.runtime.backends.triton import network_name
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from asymtrack_edge.runtime.tracker import Tracker
from tests.runtime.inference_servers import kinds, runs_and_requests


def main() -> None:
    """Prints the table."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("address", nargs="?")
    parser.add_argument("--model", default="T")
    arguments = parser.parse_args()
    folder = model_folder(arguments.model)
    manifest = load_manifest(folder)
    search = network_name(manifest, "search")
    clip = list(synthetic_clip(21))
    with tempfile.TemporaryDirectory() as scratch:
        server = None
        if arguments.address is None:
            write_repository(folder, manifest, Path(scratch) / "models")
            server = kinds()[-1](Path(scratch) / "models")
        address = arguments.address or f"triton://127.0.0.1:{server.port}"
        print(f"| clients | frames/s | ms per frame, median | 99 % | targets per run |  ({address})")

        def follow(tracker: Tracker) -> List[float]:
            times = []
            for frame, _ in clip[1:]:
                began = perf_counter()
                tracker.update(frame)
                times.append(perf_counter() - began)
            return times

        for count in (1, 2, 4, 8, 16, 32, 64):
            trackers = [Tracker.load(folder, backend=address, recover=False) for _ in range(count)]
            for tracker in trackers:
                tracker.init(*clip[0])
            before, began = runs_and_requests(address, search), perf_counter()
            with ThreadPoolExecutor(count) as pool:
                times = np.concatenate(list(pool.map(follow, trackers)))
            seconds = perf_counter() - began
            runs, requests = (b - a for a, b in zip(before, runs_and_requests(address, search)))
            middle, slow = 1000 * np.percentile(times, (50, 99))
            row = f"| {count} | {len(times) / seconds:.1f} | {middle:.1f} | {slow:.1f} | {requests / runs:.1f} |"
            print(row, flush=True)
            for tracker in trackers:
                tracker.close()
        if server is not None:
            server.close()


if __name__ == "__main__":
    main()
