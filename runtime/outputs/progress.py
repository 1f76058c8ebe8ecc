"""A progress line on stderr, drawn only where somebody is looking."""

from __future__ import annotations

import sys
from contextlib import suppress
from time import monotonic
from typing import Optional

from asymtrack_edge.runtime.outputs.base import Result, Sink
from asymtrack_edge.runtime.sources.reader import Captured


class Progress(Sink):
    """Shows how far a run is and how fast it goes.

    Args:
        total: number of frames; None if unknown.
    """

    name = "progress"
    essential = False

    def __init__(self, total: Optional[int]) -> None:
        self._total = total
        self._done = 0
        self._began = self._drawn = monotonic()
        self._tty = sys.stderr is not None and sys.stderr.isatty()

    def write(self, result: Result) -> None:
        """Counts a frame and shows what became of its targets."""
        shown = [f"{track.score:.2f} {track.state.value}" for track in list(result.tracks.values())[:3]]
        self._step("score " + ", ".join(shown) if shown else "no target")

    def skip(self, frame: Captured) -> None:
        """Counts a frame that could not be used."""
        self._step("unreadable frame")

    def _step(self, note: str = "") -> None:
        """Counts; redraws at most ten times a second."""
        self._done += 1
        now = monotonic()
        if not self._tty or now - self._drawn < 0.1:
            return
        self._drawn = now
        rate = self._done / max(1e-9, now - self._began)
        line = f"{self._done} frames  {rate:.1f}/s  {note}"
        if self._total:
            share = min(1.0, self._done / self._total)
            filled = round(share * 24)
            left = max(0, self._total - self._done) / rate
            bar = "#" * filled + "." * (24 - filled)
            line = f"[{bar}] {self._done}/{self._total}  {rate:.1f}/s  {left:.0f} s left  {note}"
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
