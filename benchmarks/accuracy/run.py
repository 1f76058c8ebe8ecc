"""Running trackers over sequences, here or in worker processes."""

from __future__ import annotations

import multiprocessing
import signal
import traceback
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from time import perf_counter
from typing import Any, Callable, Dict, Iterator, List, Optional, Tuple, cast
from typing import Sequence as Items

import numpy as np

from asymtrack_edge.benchmarks.accuracy.results import ResultStore
from asymtrack_edge.benchmarks.accuracy.trackers import BoxTracker, TrackerSpec
from asymtrack_edge.datasets.sequences import Sequence
from asymtrack_edge.errors import AsymTrackError


@dataclass(frozen=True)
class Outcome:
    """How one sequence ended.

    Attributes:
        sequence: which one.
        error: one line; None where its result was written.
        detail: the traceback, where there is one.
    """

    sequence: Sequence
    error: Optional[str] = None
    detail: str = ""


#: Frames between two reports of progress.
_REPORT_EVERY = 20


def track_sequence(
    tracker: BoxTracker, sequence: Sequence, advanced: Optional[Callable[[int], None]] = None
) -> Tuple[np.ndarray, np.ndarray]:
    """Runs one pass: initialise on frame 0, then update on every other frame.

    Args:
        tracker: what to run.
        sequence: over what.
        advanced: called now and then with the number of frames done since the last call.

    Returns:
        boxes: float64 ``(N, 4)``, x, y, w, h; row 0 is the start box.
        times: float64 ``(N,)``, seconds of ``init`` and of each ``update``, decoding of files left out.
    """
    boxes = np.empty((len(sequence), 4))
    times = np.empty(len(sequence))
    boxes[0] = sequence.start
    for i in range(len(sequence)):
        frame = sequence.read(i)
        began = perf_counter()
        if i == 0:
            tracker.init(frame, sequence.start)
        else:
            boxes[i] = tracker.update(frame)
        times[i] = perf_counter() - began
        if advanced is not None and (i + 1) % _REPORT_EVERY == 0:
            advanced(_REPORT_EVERY)
    if advanced is not None and len(sequence) % _REPORT_EVERY:
        advanced(len(sequence) % _REPORT_EVERY)
    return boxes, times


def _attempt(
    tracker: BoxTracker, sequence: Sequence, store: ResultStore, advanced: Callable[[int], None]
) -> Tuple[Optional[str], str]:
    """Runs and stores one sequence; returns the error, if any, and its traceback."""
    try:
        store.write(sequence, *track_sequence(tracker, sequence, advanced))
    except AsymTrackError as error:
        return str(error), ""
    except Exception as error:
        # Whatever a tracker raises must not cost the other sequences.
        return f"{type(error).__name__}: {error}", traceback.format_exc()
    return None, ""


def run(
    spec: TrackerSpec,
    sequences: Items[Sequence],
    store: ResultStore,
    jobs: int = 1,
    advanced: Callable[[int], None] = lambda frames: None,
) -> List[Outcome]:
    """Runs a tracker over sequences and stores each result as soon as it is there.

    Args:
        spec: the tracker.
        sequences: what to run.
        store: where results go.
        jobs: worker processes; 1 runs everything in this one.
        advanced: called now and then with the number of frames done since the last call.

    Returns:
        An outcome for each sequence. A failure, even the death of a worker, costs its sequence alone.

    Raises:
        AsymTrackError: the tracker cannot be made at all.
    """
    if not sequences:
        return []
    if jobs > 1:
        return list(_run_workers(spec, sequences, store, jobs, advanced))
    tracker = spec.build()
    return [Outcome(sequence, *_attempt(tracker, sequence, store, advanced)) for sequence in sequences]


def _worker(spec: TrackerSpec, store: ResultStore, link: Connection) -> None:
    """Answers each sequence with numbers of frames done and, at its end, (error, detail).

    The first message, None or an error, says whether the tracker could be made.
    """
    try:
        tracker = spec.build()
    except AsymTrackError as error:
        link.send(str(error))
        return
    link.send(None)
    # An interrupt from the keyboard reaches every process: the parent's is the one that decides.
    signal.signal(signal.SIGINT, signal.SIG_IGN)
    with suppress(EOFError, OSError):
        while True:
            sequence = link.recv()
            link.send(_attempt(tracker, sequence, store, link.send))


class _Pool:
    """Worker processes that are given one sequence at a time, so that a death can be laid to one."""

    def __init__(self, spec: TrackerSpec, store: ResultStore) -> None:
        # Not fork: the parent may already run threads of OpenCV or of an inference runtime.
        self.context = multiprocessing.get_context("spawn")
        self.spec = spec
        self.store = store
        self.workers: Dict[Any, Any] = {}

    def start(self) -> Connection:
        """Starts a worker and waits until its tracker is ready.

        Raises:
            AsymTrackError: it cannot be made.
        """
        here, there = self.context.Pipe()
        process = self.context.Process(target=_worker, args=(self.spec, self.store, there), daemon=True)
        process.start()
        there.close()
        self.workers[here] = process
        try:
            error = here.recv()
        except EOFError:
            process.join()
            error = f"a worker process ended while making the tracker ({_ending(process.exitcode)})"
        if error is not None:
            raise AsymTrackError(error)
        return here

    def drop(self, link: Connection) -> str:
        """Forgets a dead worker; returns how it ended."""
        process = self.workers.pop(link)
        process.join()
        link.close()
        return _ending(process.exitcode)

    def close(self) -> None:
        for link, process in self.workers.items():
            link.close()
            process.join(timeout=1)
            if process.is_alive():
                process.terminate()


def _ending(code: Optional[int]) -> str:
    return f"signal {-code}" if code is not None and code < 0 else f"exit code {code}"


def _run_workers(
    spec: TrackerSpec, sequences: Items[Sequence], store: ResultStore, jobs: int, advanced: Callable[[int], None]
) -> Iterator[Outcome]:
    # Longest first: a long sequence begun last would keep one worker busy after the others are done.
    waiting = sorted(sequences, key=len)
    pool = _Pool(spec, store)
    busy: Dict[Any, Sequence] = {}
    try:
        idle = [pool.start() for _ in range(min(jobs, len(waiting)))]
        while waiting or busy:
            while waiting and idle:
                link = idle.pop()
                try:
                    link.send(waiting[-1])
                except OSError:
                    # It died between two sequences (killed for memory, say): none is to blame.
                    pool.drop(link)
                    idle.append(pool.start())
                    continue
                busy[link] = waiting.pop()
            for ready in wait(list(busy)):
                link = cast(Connection, ready)
                try:
                    message = link.recv()
                    if isinstance(message, int):
                        advanced(message)
                        continue
                    error, detail = message
                    idle.append(link)
                except (EOFError, ConnectionResetError):
                    error = f"the worker process died ({pool.drop(link)})"
                    detail = ""
                    if waiting:
                        idle.append(pool.start())
                yield Outcome(busy.pop(link), error, detail)
    finally:
        pool.close()
