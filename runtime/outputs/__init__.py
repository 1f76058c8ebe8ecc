"""Where results go: what a run hands over for each frame, and what takes it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from dataclasses import dataclass
from typing import Dict

from asymtrack_edge.runtime.sources.reader import Captured
from asymtrack_edge.runtime.target import Track


@dataclass(frozen=True)
class Result:
    """What was decided on one frame: the tracks by target.

    ``latency`` is seconds from the frame's arrival in this process to the decision; for a file, whose
    frames wait for the tracker, from when it was taken up.
    """

    frame: Captured
    tracks: Dict[int, Track]
    latency: float


class Sink(ABC):
    """Takes the result of every frame.

    Attributes:
        name: for people.
        essential: whether it is a reason to go on: a run whose last such sink failed ends.
        wants_end: somebody asked here for the run to end.
    """

    name = ""
    essential = True
    wants_end = False

    @abstractmethod
    def write(self, result: Result) -> None:
        """Takes one frame's result; does not change its image.

        Raises:
            OSError: it cannot be written; what was written before is safe.
        """

    def skip(self, frame: Captured) -> None:  # noqa: B027
        """Hears of a frame that could not be used."""

    def close(self) -> None:  # noqa: B027
        """Completes what was written."""

    def discard(self) -> None:
        """Closes without leaving anything behind: the run did not begin."""
        self.close()
