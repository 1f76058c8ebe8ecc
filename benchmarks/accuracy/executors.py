"""Running a tracker over sequences: in local worker processes, or as tasks of a Ray cluster.

No tracker runs in the command's own process. A tracker that crashes loses only its current sequence, and one that
never returns can be killed. An executor yields the outcome of each sequence; its caller writes the results, so that
the files are the same wherever the tracker ran.
"""

from __future__ import annotations

import socket
import sys
import tempfile
import traceback
from dataclasses import replace
from functools import lru_cache, partial
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

#: Number of frames between progress reports.
_REPORT_EVERY = 20


class Outcome(NamedTuple):
    """The outcome of one sequence."""

    sequence: Sequence
    boxes: Optional[np.ndarray] = None  # float64 (N, 4), x, y, w, h; row 0 is the start box; None after an error
    times: Optional[np.ndarray] = None  # float64 (N,), seconds of init and of each update, without decoding
    error: Optional[str] = None  # one line
    detail: str = ""  # the traceback, if there is one


Advanced = Callable[[int], Any]
#: Runs a tracker over sequences, the longest first: started last, it would keep one worker busy while the others
#: idle. Regularly calls its third argument with the number of frames done since the last call, and yields an outcome
#: for each sequence, in any order. Raises AsymTrackError if the tracker cannot be made at all.
Executor = Callable[[TrackerSpec, Items[Sequence], Advanced], Iterator[Outcome]]


def track(tracker: Any, advanced: Advanced, sequence: Sequence) -> Outcome:
    """Runs one pass: initialises on frame 0, then updates on every other frame."""
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
        # An exception in one sequence must not affect the others.
        line = " ".join(f"{type(error).__name__}: {error}".split())
        return Outcome(sequence, error=line, detail=traceback.format_exc())
    return Outcome(sequence, boxes, times)


def _limited(spec: TrackerSpec, threads: int) -> TrackerSpec:
    """The tracker with this many CPU threads, unless its spec sets a number itself or it runs on a server."""
    return spec if spec.threads or "://" in spec.backend else replace(spec, threads=threads)


def _make(spec: TrackerSpec) -> Callable[[Advanced, Sequence], Outcome]:
    return partial(track, spec.build())


def local_executor(jobs: int, spec: TrackerSpec, sequences: Items[Sequence], advanced: Advanced) -> Iterator[Outcome]:
    """Runs up to ``jobs`` worker processes with one sequence each at a time, so that a crash is due to one sequence.

    An interrupt ends the workers and names the sequences that they were running.
    """
    waiting = sorted(sequences, key=len)
    ours = spec if jobs == 1 else _limited(spec, max(1, processors() // jobs))
    idle: List[Worker] = []
    busy: Dict[Any, Sequence] = {}  # by its worker
    try:
        while waiting or busy:
            while waiting and len(busy) < jobs:
                worker: Any = idle.pop() if idle else Worker(_make, ours)
                if worker.send(waiting[-1]):  # else it died between two sequences, and neither failed
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
        cli.say(f"\n{spec.label} was interrupted in {names or 'no sequence'}")
        raise
    finally:
        for worker in [*idle, *busy]:
            worker.close()


def join_cluster(address: str, processors: int) -> Any:
    """Joins a Ray cluster by its address; returns the module ``ray``. AsymTrackError without a cluster, or without Ray.

    ``"auto"`` finds the running cluster; ``"local"`` starts one with this many ``processors`` on this machine.
    """
    ray = require("ray", "ray", "--ray")
    try:
        if ":" in address:  # if nobody answers, Ray itself tries for minutes
            host, _, port = address.rpartition("/")[2].rpartition(":")
            socket.create_connection((host, int(port)), 10).close()
        # Workers import what this process can import, including modules in the working directory.
        environment = {"env_vars": {"PYTHONPATH": ":".join(path for path in sys.path if path)}}
        options = {"num_cpus": processors} if address == "local" else {}
        quiet = {"ignore_reinit_error": True, "log_to_driver": False, "logging_level": "error"}
        ray.init(address, runtime_env=environment, **options, **quiet)
    except Exception as error:  # Ray has no type of its own for most failures
        raise AsymTrackError(f"cannot join a Ray cluster at {address}: {error}") from None
    return ray


def ray_executor(ray: Any, spec: TrackerSpec, sequences: Items[Sequence], advanced: Advanced) -> Iterator[Outcome]:
    """Runs one task of a Ray cluster per sequence and reports progress when a task ends. Lost tasks are run again.

    The files of a model travel through the object store, once. The files of the sequences do not: every node must
    see them under the same path.
    """
    ours = _limited(spec, 1)
    on_gpu = "cuda" in ours.device or ours.backend in ("onnxruntime-cuda", "onnxruntime-tensorrt", "tensorrt")
    cpus, gpus = ours.threads or 1, int(on_gpu)
    resources = [node["Resources"] for node in ray.nodes()]
    if not any(has.get("CPU", 0) >= cpus and has.get("GPU", 0) >= gpus for has in resources):
        cli.say(f"a task needs CPUs: {cpus}, GPUs: {gpus}. No node of the Ray cluster has them: waiting for one")
    shipped = spec.kind == "model" and spec.name.upper() not in VARIANTS
    files = [path for path in Path(spec.name).iterdir() if path.is_file()] if shipped else []
    carried = ray.put((ours, {path.name: path.read_bytes() for path in files}))
    task = ray.remote(num_cpus=cpus, num_gpus=gpus, max_retries=3)(_task)
    # In a list, because Ray would replace a bare reference by its value, again for each task.
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
    return track(_built(carried[0])[0], lambda frames: None, sequence)


@lru_cache(maxsize=2)
def _built(carried: Any) -> Tuple[Any, tempfile.TemporaryDirectory]:
    """This worker's tracker, and the folder of its model's files; both live as long as the cache holds them."""
    import ray

    spec, content = ray.get(carried)
    folder = tempfile.TemporaryDirectory()
    for name, data in content.items():
        Path(folder.name, name).write_bytes(data)
    return (replace(spec, name=folder.name) if content else spec).build(), folder
