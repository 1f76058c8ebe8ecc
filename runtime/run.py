"""A tracking run: reads frames, tracks targets, feeds the sinks, and runs other threads' calls between frames."""

from __future__ import annotations

import threading
from collections import deque
from concurrent.futures import Future
from dataclasses import replace
from time import monotonic, perf_counter
from typing import Any, Callable, Deque, Dict, List, Optional, Sequence, Tuple

import numpy as np

from asymtrack_edge.errors import AsymTrackError, FrameError, ServerError, SourceError, UsageError
from asymtrack_edge.files import printable
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.outputs import Result, Sink
from asymtrack_edge.runtime.sources.reader import Captured, Reader
from asymtrack_edge.runtime.tracker import MultiTracker, State, Track


class Run:
    """Runs a tracker on the calling thread, over at most ``limit`` frames of a reader.

    Other threads change targets or pause the run through ``submit``: each submitted call runs between
    two frames. ``report`` is called with messages for the user.

    The ``sinks`` receive every frame's result and are closed with the run. A sink that fails is closed and
    dropped, with a line in ``failures``; the run ends when no essential sink is left.
    """

    def __init__(
        self,
        tracker: MultiTracker,
        reader: Reader,
        limit: Optional[int] = None,
        report: Callable[[str], None] = lambda line: None,
    ) -> None:
        self.tracker = tracker
        self.reader = reader
        self.sinks: List[Sink] = []
        self.failures: List[str] = []
        self.count = 0  #: frames taken from the reader
        self._updates = 0  #: those of them in which targets were tracked
        self.latest: Optional[Result] = None
        self.paused = self.source_ended = self.ended = False
        self._limit = limit
        self._report = report
        self._read_seconds = 0.0
        #: Frames that were unusable or that a server did not answer; frames with a lost target.
        self._unreadable = self._lost = 0
        self._step = self._away = False
        #: Shortest and longest time between frames on the source's own clock.
        self._periods = (float("inf"), 0.0)
        self._calls: Deque[Tuple[Callable[[], Any], Future[Any]]] = deque()
        self._call_came = threading.Condition()

    def first_frame(self) -> np.ndarray:
        """Reads the frame in which the targets are marked, frame 0 of the run, and returns a copy."""
        frame = self._next()
        until = monotonic() + 10  # seconds in which a camera must deliver a decodable picture
        while frame is not None and frame.image is None and self.reader.source.live and monotonic() < until:
            frame = self._next()
        if frame is None or frame.image is None:
            name = self.reader.source.name
            raise SourceError(f"the first frame of {name} cannot be read, but the target is marked in it")
        self.tracker.backend.check_frame(frame.image)
        self.latest = Result(frame, {}, 0.0)
        # Marking takes time, and meanwhile a camera on the GPU reuses its frames' memory.
        self._marked = np.array(frame.image)
        return self._marked

    def start(self, boxes: Sequence[Sequence[float]]) -> None:
        """Marks targets in the first frame and hands it to the sinks; ``BoxError`` for an invalid box."""
        assert self.latest is not None
        began, self._began = monotonic(), perf_counter()
        tracks = {self.tracker.add(self._marked, box): Track(Box(*box), 1.0, State.TRACKING) for box in boxes}
        self._hand_over(self.latest.frame, tracks, began)

    def follow(self) -> None:
        """Tracks until the source ends, the limit is reached or ``end()`` is called."""
        while not self.ended and (self._limit is None or self.count < self._limit):
            self._run_calls()
            frame = None if self.ended else self._next()
            if frame is None:
                return
            self._track(frame)

    def linger(self) -> None:
        """Waits for ``end()`` after the last frame; refuses further calls."""
        self.source_ended = self.paused = True
        self.latest = self.latest and replace(self.latest)  # a new result: viewers learn that there are no more frames
        self.reader.close()  # frees the camera
        while not self.ended:
            self._run_calls()

    def submit(self, call: Callable[[], Any]) -> Future[Any]:
        """Has the run's thread run ``call`` between two frames. May be called from any thread."""
        future: Future[Any] = Future()
        with self._call_came:
            if self.ended or self.source_ended:
                future.set_exception(UsageError(f"the {'run' if self.ended else 'source'} has ended"))
            else:
                self._calls.append((call, future))
                self._call_came.notify_all()
        return future

    def end(self) -> None:
        """Ends the run after the current frame and refuses pending calls. May be called from any thread."""
        with self._call_came:
            self.ended = True
            self._call_came.notify_all()
            while self._calls:
                self._calls.popleft()[1].set_exception(UsageError("the run has ended"))

    def pause(self, paused: bool, step: bool = False) -> None:
        """Pauses (with ``step``: after one more frame) or resumes the run; to be called through ``submit``."""
        if self.reader.source.live:
            raise UsageError("a live source cannot be paused")
        self.paused, self._step = paused, step

    def _run_calls(self) -> None:
        """Runs the submitted calls, and waits while the run is paused."""
        while True:
            with self._call_came:
                began = perf_counter()
                try:
                    while (self.paused or self.source_ended) and not (self._step or self._calls or self.ended):
                        self._call_came.wait()
                finally:  # even if a signal interrupts the wait
                    self._began += perf_counter() - began  # pauses do not count towards the run's speed
                if self.ended or not self._calls:
                    self._step = False
                    return
                call, future = self._calls.popleft()
            try:
                future.set_result(call())
            except Exception as error:  # for whoever submitted the call
                future.set_exception(error)

    def _next(self) -> Optional[Captured]:
        began = perf_counter()
        frame = next(self.reader, None)
        self._read_seconds += perf_counter() - began
        return frame

    def _track(self, frame: Captured) -> None:
        began = monotonic()
        try:
            if frame.image is None:
                raise FrameError("unreadable")
            tracks = self.tracker.update(frame.image)
            self._updates += bool(tracks)
        except (FrameError, ServerError) as error:
            if isinstance(error, ServerError) and not self._away:
                self._away = True
                self._report(f"{error}; frames count as unreadable until it answers again")
            self.count += 1
            self._unreadable += 1
            return
        if self._away:
            self._away = False
            self._report(f"{self.tracker.backend.description} answers again")
        before = self.latest.frame if self.latest is not None else frame
        if frame.pts is not None and before.pts is not None and frame.number > before.number:
            period = (frame.pts - before.pts) / (frame.number - before.number)
            self._periods = min(self._periods[0], period), max(self._periods[1], period)
        self._hand_over(frame, tracks, began)

    def _hand_over(self, frame: Captured, tracks: Dict[int, Track], began: float) -> None:
        # A file's frame was decoded ahead: the time that it waited is not latency.
        since = frame.received if self.reader.source.live else began
        self.latest = result = Result(frame, tracks, monotonic() - since)
        self.count += 1
        self._lost += any(track.state is State.LOST for track in tracks.values())
        for sink in list(self.sinks):
            try:
                sink.write(result)
            except OSError as error:
                self._drop(sink, error)
            if sink.wants_end:
                self.end()

    def _drop(self, sink: Sink, error: OSError) -> None:
        self.sinks.remove(sink)
        whole = self._complete(sink)
        alone = not any(other.essential for other in self.sinks)
        if isinstance(error, BrokenPipeError):  # the reading program closed the pipe: not a failure
            self._report(f"{sink.name}: the reading program has closed it")
            if alone:
                self.end()
            return
        if whole:
            until = self.latest.frame.number if self.latest and self.count > 1 else 0
            held = f"it holds what was written before frame {until}" if until else "nothing was written"
            self.fail(f"{sink.name}: {error.strerror or error}; {held}")
        if alone:
            raise SourceError("no output is left: the run ends")

    def _complete(self, sink: Sink, keep: bool = True) -> bool:
        """Closes a sink; returns whether that succeeded."""
        try:
            sink.close(keep)
        except (AsymTrackError, OSError) as error:
            part = getattr(error, "filename", None) or sink.name
            where = f"; what was written is in {printable(part)}" if part != sink.name else ""
            self.fail(f"{sink.name} cannot be completed: {getattr(error, 'strerror', None) or error}{where}")
            return False
        return True

    def fail(self, line: str) -> None:
        """Reports a failure and records it."""
        self.failures.append(line)
        self._report(line)

    def close(self) -> None:
        """Completes the sinks and closes the reader. Sinks of a run that did not start leave no files."""
        self.end()
        self.reader.close()
        while self.sinks:
            self._complete(self.sinks.pop(), self.count > 0)

    @property
    def whole(self) -> bool:
        """Whether every frame so far of a file or folder could be read; always true for a live source."""
        return self.reader.source.live or not (self._unreadable or self.reader.source.damaged)

    def summary(self) -> Dict[str, Any]:
        """Counts and speeds: frames per second of the whole run, and milliseconds per frame by stage."""
        seconds = self.tracker.seconds
        inside, updates = sum(seconds.values()), self._updates
        reader, source = self.reader, self.reader.source
        counts: Dict[str, Any] = {"frames": self.count, "unreadable": self._unreadable, "lost": self._lost}
        if source.missing or source.damaged:
            counts.update(missing=source.missing, damaged=source.damaged)
        if source.live:
            counts.update(dropped=reader.dropped, stalls=reader.stalls, reconnects=reader.reconnects)
            counts["worst_age_ms"] = round(1000 * reader.worst_age, 1)
        stages = {name: spent / max(1, updates) for name, spent in seconds.items()}
        stages["read"] = self._read_seconds / max(1, self.count)
        return {
            **counts,
            "variable_rate": self._periods[1] > 1.5 * self._periods[0] + 0.001,  # Matroska rounds times to 1 ms
            "fps": round(self.count / max(1e-9, perf_counter() - self._began), 1),
            "update_fps": round(updates / inside, 1) if updates and inside else None,
            "milliseconds": {name: round(1000 * spent, 3) for name, spent in stages.items()},
            "backend": self.tracker.backend.name,
        }
