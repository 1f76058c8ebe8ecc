"""Outputs of a run: the result of each frame, and the sinks that take it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Dict

from asymtrack_edge.runtime.sources.reader import Captured
from asymtrack_edge.runtime.tracker import Track


@dataclass(frozen=True)
class Result:
    """A frame's tracks by target; ``latency``: seconds since the frame arrived (from a file: since it was begun)."""

    frame: Captured
    tracks: Dict[int, Track]
    latency: float


class Sink(ABC):
    """Takes the result of every frame."""

    name = ""
    essential = True  #: the run ends when its last essential sink has failed
    wants_end = False  #: whether the user asked this sink to end the run

    @abstractmethod
    def write(self, result: Result) -> None:
        """Takes one frame's result without changing its image. After an ``OSError``, earlier results are safe."""

    def close(self, keep: bool = True) -> None:  # noqa: B027
        """Completes the output. Without ``keep`` (the run did not begin) it leaves nothing behind."""
