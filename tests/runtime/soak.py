"""An hour of frames through a whole run, faster than real time: does memory stay flat?

``python -m tests.runtime.soak MODEL [--frames 108000]`` loops a short video through reader, tracker
and all outputs, opening the source anew each time round, with targets that come and go. It prints
memory, open files and threads as it goes, and fails if any has grown since the first tenth. MODEL
``fake`` stands for the networks: everything around them, many times faster. The index of a video that
is being written grows in memory, by about 100 bytes a frame (mp4): measure without one, or with.
"""

from __future__ import annotations

import argparse
import os
import sys
import tempfile
import threading
from pathlib import Path
from time import perf_counter
from typing import Iterator, List, Optional

import numpy as np

from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import MultiTracker, open_reader, open_source
from asymtrack_edge.runtime.outputs.base import Result, Sink
from asymtrack_edge.runtime.outputs.pictures import VideoWriter
from asymtrack_edge.runtime.outputs.rows import RowWriter, as_json, box_writer
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.sources import Source
from tests.runtime.simulated import ColourBackend, write_video

#: Memory may grow by this much after the first tenth: the allocator's play, not a leak per frame.
PLAY_MB = 8.0


class Looped(Source):
    """A video again and again, opened anew each time; now and then a frame is missing or resized."""

    def __init__(self, path: Path, frames: int) -> None:
        self.name, self.length, self._path = "loop", frames, path

    def __iter__(self) -> Iterator[Optional[np.ndarray]]:
        given = 0
        while given < (self.length or 0):
            with open_source(str(self._path)) as source:
                for frame in source:
                    given += 1
                    yield None if given % 997 == 0 else frame[:120] if given % 499 == 0 else frame


class Coming(Sink):
    """Adds and removes targets as the run goes, and watches what the process holds."""

    name = "coming and going"
    essential = False

    def __init__(self, run: Run, truth: List[List[Box]], every: int) -> None:
        self.run, self.truth, self.every = run, truth, every
        self.samples: List[List[float]] = []
        self.began = perf_counter()

    def write(self, result: Result) -> None:
        count, tracker = self.run.count, self.run.tracker
        if count % 50 == 0:
            if len(tracker) > 3:
                tracker.remove(tracker.ids[1])
            boxes = self.truth[result.frame.number % len(self.truth)]
            if result.frame.image.shape[0] == 240:
                tracker.add(result.frame.image, boxes[count // 50 % len(boxes)])
        if count % self.every == 0:
            with open("/proc/self/statm") as file:
                memory = int(file.read().split()[1]) * os.sysconf("SC_PAGE_SIZE") / 1e6
            sample = [count, memory, len(os.listdir("/proc/self/fd")), threading.active_count()]
            self.samples.append(sample)
            rate = count / (perf_counter() - self.began)
            print("frame {:.0f}: {:.1f} MB, {:.0f} descriptors, {:.0f} threads".format(*sample), end="")
            print(f", {rate:.0f} frames per second", flush=True)


def main(arguments: Optional[List[str]] = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model")
    parser.add_argument("--frames", type=int, default=108000, help="an hour at 30 frames per second")
    parser.add_argument("--video", default="", help="mp4, mkv or avi: also write a video (default: none)")
    parser.add_argument("--threads", type=int, default=1)
    options = parser.parse_args(arguments)
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        truth = write_video(folder / "in.avi", 300)
        reader = open_reader(Looped(folder / "in.avi", options.frames))
        if options.model == "fake":
            tracker = MultiTracker(ColourBackend())
        else:
            tracker = MultiTracker.load(options.model, threads=options.threads)
        run = Run(tracker, reader, options.frames)
        run.first_frame()
        watch = Coming(run, truth, max(1, options.frames // 20))
        sinks = [box_writer(folder / "o.csv", True), RowWriter(folder / "o.jsonl", as_json), watch]
        if options.video:
            sinks.append(VideoWriter(folder / f"o.{options.video}", 30, (240, 320)))
        for sink in sinks:
            run.sinks.append(sink)
        run.start(truth[0])
        run.follow()
        run.close()
        rows = (folder / "o.jsonl").read_text().count("\n")
    print(f"{run.count} frames, {run.unreadable} unreadable, {rows} messages written")
    early, late = watch.samples[1], watch.samples[-1]
    grown = late[1] - early[1]
    print(f"since a tenth of the way: {grown:+.1f} MB, {late[2] - early[2]:+.0f} descriptors")
    good = grown < PLAY_MB and late[2] <= early[2] and late[3] <= early[3]
    good = good and run.count == options.frames and rows == run.count - run.unreadable
    print("passed" if good else "FAILED")
    return 0 if good else 1


if __name__ == "__main__":
    sys.exit(main())
