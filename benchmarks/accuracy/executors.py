"""Running a tracker over sequences: in worker processes here, or as tasks of a Ray cluster.

No tracker runs in the process of the command: one that crashes costs its sequence alone, and one that never
returns can be ended. An executor yields how each sequence ended; whoever asked writes the results, so that the
files are the same wherever the tracker ran.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import lru_cache
from multiprocessing.connection import wait
from pathlib import Path
from time import perf_counter
from typing import Any, Callable, Dict, Iterator, List, NamedTuple, Optional, Tuple
from typing import Sequence as Items

import numpy as np

from asymtrack_edge import cli
from asymtrack_edge.benchmarks.trackers import TrackerSpec, box_of
from asymtrack_edge.benchmarks.worker import Worker
from asymtrack_edge.datasets import Sequence
from asymtrack_edge.errors import AsymTrackError, BackendError, require
from asymtrack_edge.files import printable
from asymtrack_edge.runtime.backends.threads import processors
from asymtrack_edge.variants import VARIANTS

#: Frames between two reports of progress.
_REPORT_EVERY = 20


class Outcome(NamedTuple):
    """How one sequence ended."""

    sequence: Sequence
    boxes: Optional[np.ndarray] = None  # float64 (N, 4), x, y, w, h; row 0 is the start box; None after an error
    times: Optional[np.ndarray] = None  # float64 (N,), seconds of init and of each update, without decoding
    error: Optional[str] = None  # one line
    detail: str = ""  # the traceback, where there is one


Advanced = Callable[[int], Any]
#: Runs a tracker over sequences, the longest first: begun last, it would keep one worker busy alone. Calls its
#: third argument now and then with the number of frames done since the last call, and yields an outcome for each
#: sequence, in any order. Raises AsymTrackError where the tracker cannot be made at all.
Executor = Callable[[TrackerSpec, Items[Sequence], Advanced], Iterator[Outcome]]


def track(tracker: Any, sequence: Sequence, advanced: Advanced) -> Outcome:
    """Runs one pass: initialise on frame 0, then update on every other frame."""
    boxes, times = np.empty((len(sequence), 4)), np.empty(len(sequence))
    boxes[0] = sequence.start
    try:
        for i in range(len(sequence)):
            frame = sequence.read(i)
            began = perf_counter()
            if i == 0:
                tracker.init(frame, sequence.start)
            else:
                boxes[i] = box_of(tracker.update(frame))
            times[i] = perf_counter() - began
            if (i + 1) % _REPORT_EVERY == 0 or i + 1 == len(sequence):
                advanced(i % _REPORT_EVERY + 1)
    except AsymTrackError as error:
        return Outcome(sequence, error=str(error))
    except Exception as error:
        # Whatever a tracker raises must not cost the other sequences.
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome(sequence, error=line, detail=traceback.format_exc())
    return Outcome(sequence, boxes, times)


def _limited(spec: TrackerSpec, threads: int) -> TrackerSpec:
    """The tracker on so many CPU threads, unless it names a number itself or runs on a server."""
    return spec if spec.threads or "://" in spec.backend else replace(spec, threads=threads)


def _make(spec: TrackerSpec) -> Callable[[Advanced, Sequence], Outcome]:
    tracker = spec.build()
    return lambda advanced, sequence: track(tracker, sequence, advanced)


def local_executor(jobs: int, spec: TrackerSpec, sequences: Items[Sequence], advanced: Advanced) -> Iterator[Outcome]:
    """Up to ``jobs`` worker processes, given one sequence at a time, so that a death can be laid to one.

    An interrupt ends the workers and names the sequences they were in.
    """
    waiting = sorted(sequences, key=len)
    ours = spec if jobs == 1 else _limited(spec, max(1, processors() // jobs))
    idle: List[Worker] = []
    busy: Dict[Any, Sequence] = {}  # by its worker
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker: Any = idle.pop() if idle else Worker(_make, ours)
                if worker.send(waiting[-1]):  # else it died between two sequences: none is to blame
                    busy[worker] = waiting.pop()
            for worker in wait(list(busy)):
                try:
                    outcome = worker.receive()
                except BackendError as error:
                    worker.close()
                    outcome = Outcome(busy[worker], error=str(error))
                else:
                    if isinstance(outcome, int):
                        advanced(outcome)
                        continue
                    idle.append(worker)
                del busy[worker]
                yield outcome
    except KeyboardInterrupt:
        names = ", ".join(printable(sequence.name) for sequence in busy.values())
        cli.say(f"\n{spec.label} is ended in {names or 'no sequence'}")
        raise
    finally:
        for worker in [*idle, *busy]:
            worker.close()


def join_cluster(address: str, processors: int) -> Any:
    """Joins a Ray cluster by its address; returns the module ``ray``. AsymTrackError where there is none, or no Ray.

    ``"auto"`` finds the cluster that runs, ``"local"`` starts one of so many ``processors`` on this machine.
    """
    ray = require("ray", "ray", "--ray")
    try:
        if ":" in address:  # Ray itself tries for minutes where nobody answers
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        # Workers find what this process finds, modules in the working directory among it.
        environment = {"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}}
        options = {"num_cpus": processors} if address == "local" else {}
        quiet = {"ignore_reinit_error": True, "log_to_driver": False, "logging_level": "error"}
        ray.init(address, runtime_env=environment, **options, **quiet)
    except (OSError, ValueError, RuntimeError) as error:
        raise AsymTrackError(f"cannot join a Ray cluster at {address}: {error}") from None
    return ray


def ray_executor(ray: Any, spec: TrackerSpec, sequences: Items[Sequence], advanced: Advanced) -> Iterator[Outcome]:
    """Tasks of a Ray cluster, one a sequence; progress is told when it is done. One whose worker dies is run again.

    The files of a model travel through the object store, once. Those of the sequences do not: every node must see
    them under the same path.
    """
    ours = _limited(spec, 1)
    on_gpu = "cuda" in ours.device or ours.backend in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt")
    shipped = spec.kind == "model" and spec.name.upper() not in VARIANTS
    files = [path for path in Path(spec.name).iterdir() if path.is_file()] if shipped else []
    carried = ray.put((ours, {path.name: path.read_bytes() for path in files}))
    task = ray.remote(num_cpus=ours.threads or 1, num_gpus=int(on_gpu), max_retries=3)(_task)
    # In a list: Ray replaces a bare reference by its value, for each task anew.
    pending = {task.remote([carried], s): s for s in sorted(sequences, key=len, reverse=True)}
    try:
        while pending:
            (done,), _ = ray.wait(list(pending))
            sequence = pending.pop(done)
            advanced(len(sequence))
            try:
                yield ray.get(done)
            except ray.exceptions.RayError as error:
                yield Outcome(sequence, error=f"Ray gave up: {str(error).strip().splitlines()[-1]}")
    finally:
        for reference in pending:
            ray.cancel(reference, force=True)


def _task(carried: List[Any], sequence: Sequence) -> Outcome:
    return track(_built(carried[0])[0], sequence, lambda frames: None)


@lru_cache(maxsize=2)
def _built(carried: Any) -> Tuple[Any, tempfile.TemporaryDirectory]:
    """This worker's tracker, and the folder with its model's files; both stay as long as the cache holds them."""
    import ray

    spec, content = ray.get(carried)
    folder = tempfile.TemporaryDirectory()
    for name, data in content.items():
        Path(folder.name, name).write_bytes(data)
    return (replace(spec, name=folder.name) if content else spec).build(), folder
