"""A progress line on stderr, drawn only where somebody is looking."""

from __future__ import annotations

import sys
from contextlib import suppress
from time import monotonic
from typing import Any, Callable, Optional

from asymtrack_edge.runtime.outputs.base import Result, Sink
from asymtrack_edge.runtime.sources.reader import Captured


class Progress(Sink):
    """Shows how far a run is and how fast it goes.

    Args:
        total: number of steps; None if unknown.
        unit: what a step is.
    """

    name = "progress"
    essential = False

    def __init__(self, total: Optional[int], unit: str = "frames") -> None:
        self.total = total
        self.unit = unit
        self.done = 0
        self._began = self._drawn = monotonic()
        self._tty = sys.stderr is not None and sys.stderr.isatty()

    def write(self, result: Result) -> None:
        """Counts a frame and shows what became of its targets."""
        shown = [f"{track.score:.2f} {track.state.value}" for track in list(result.tracks.values())[:3]]
        self.step("score " + ", ".join(shown) if shown else "no target")

    def skip(self, frame: Captured) -> None:
        """Counts a frame that could not be used."""
        self.step("unreadable frame")

    def step(self, note: str = "") -> None:
        """Counts a step; redraws at most ten times a second."""
        self.done += 1
        now = monotonic()
        if not self._tty or now - self._drawn < 0.1:
            return
        self._drawn = now
        rate = self.done / max(1e-9, now - self._began)
        line = f"{self.done} {self.unit}  {rate:.1f}/s  {note}"
        if self.total:
            share = min(1.0, self.done / self.total)
            filled = round(share * 24)
            left = max(0, self.total - self.done) / rate
            bar = "#" * filled + "." * (24 - filled)
            line = f"[{bar}] {self.done}/{self.total}  {rate:.1f}/s  {left:.0f} s left  {note}"
        self._draw(line)

    def close(self) -> None:
        """Removes the line."""
        if self._tty:
            self._draw("")

    @staticmethod
    def _draw(line: str) -> None:
        with suppress(OSError):  # a terminal that was closed is no reason to end
            sys.stderr.write(f"\r\x1b[2K{line}")
            sys.stderr.flush()


class TimeBar:
    """Shows how far something is that takes a known time.

    Args:
        seconds: how long.
    """

    def __init__(self, seconds: float) -> None:
        self._progress = Progress(max(1, round(seconds)), "s")
        self._began = monotonic()

    def tick(self, note: str) -> None:
        """Moves the bar to now."""
        while self._progress.done < min(monotonic() - self._began, self._progress.total or 0):
            self._progress.step(note)

    def __enter__(self) -> Callable[[str], None]:
        return self.tick

    def __exit__(self, *_: Any) -> None:
        self._progress.close()
