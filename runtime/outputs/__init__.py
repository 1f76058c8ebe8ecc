"""Where results go: what a run hands over for each frame, and what takes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Dict

from asymtrack_edge.runtime.sources.reader import Captured
from asymtrack_edge.runtime.tracker import Track


@dataclass(frozen=True)
class Result:
    """Tracks of a frame by target; ``latency`` in seconds since it came, or since a file's frame was taken up."""

    frame: Captured
    tracks: Dict[int, Track]
    latency: float


class Sink(ABC):
    """Takes the result of every frame."""

    name = ""
    essential = True  #: a run whose last such sink failed ends
    wants_end = False  #: somebody asked here for the run to end

    @abstractmethod
    def write(self, result: Result) -> None:
        """Takes one frame's result; does not change its image. After an ``OSError`` what was written before is safe."""

    def close(self, keep: bool = True) -> None:  # noqa: B027
        """Completes what was written, or without ``keep`` leaves nothing behind: the run did not begin."""
