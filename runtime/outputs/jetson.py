"""Boxes drawn on the GPU of a Jetson, into frames that are encoded and sent from there, by jetson-utils."""

from __future__ import annotations

import re
from pathlib import Path

from asymtrack_edge.errors import SourceError
from asymtrack_edge.runtime.outputs.base import Result, Sink
from asymtrack_edge.runtime.outputs.pictures import COLOURS
from asymtrack_edge.runtime.sources.jetson import JetsonFrame, jetson_utils
from asymtrack_edge.runtime.target import State


class JetsonWriter(Sink):
    """Draws the boxes on the GPU, and encodes or sends the frames from there.

    Args:
        where: as jetson-utils takes it: ``file.mp4``, ``rtp://host:port``, ``webrtc://@:8554/out``,
            ``display://0``. It writes into a file as it goes: an earlier one is gone.

    Raises:
        SourceError: jetson-utils is missing, or cannot open it.
    """

    def __init__(self, where: Path) -> None:
        self.name = re.sub(r"^(\w+):/(?!/)", r"\1://", str(where))  # a Path has swallowed a slash
        self._utils = jetson_utils()
        try:
            self._output = self._utils.videoOutput(self.name)
        except Exception as error:  # it raises plain exceptions, and logs the reason
            raise SourceError(f"jetson-utils cannot write {self.name}: {error}") from None

    def write(self, result: Result) -> None:
        """Draws into the frame, which is nobody's after this: name this sink last."""
        frame = result.frame.image
        if not isinstance(frame, JetsonFrame):
            return
        for target, track in result.tracks.items():
            lost = track.state is State.LOST
            blue, green, red = (150, 150, 150) if lost else COLOURS[target % len(COLOURS)]
            colour = (red, green, blue, 255) if frame.format == "rgb8" else (blue, green, red, 255)
            x0, y0, x1, y1 = track.box.x, track.box.y, track.box.x + track.box.w, track.box.y + track.box.h
            for start, end in (((x0, y0), (x1, y0)), ((x1, y0), (x1, y1)), ((x1, y1), (x0, y1)), ((x0, y1), (x0, y0))):
                self._utils.cudaDrawLine(frame.image, start, end, colour, 1 if lost else 3)
        self._output.Render(frame.image)

    def close(self) -> None:
        """Completes the file or ends the stream."""
        self._output.Close()
