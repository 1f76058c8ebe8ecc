"""A row or line per frame: boxes as csv, messages as JSON, into files.

A message is one JSON object (``docs/cameras.md`` documents it for other languages)::

    {"frame": 17, "time": 1760000000.123456, "pts": 0.567, "age_ms": 21.4, "size": [1280, 720],
     "targets": [{"id": 0, "box": [120.25, 80.5, 40.0, 60.0], "score": 0.9312, "state": "tracking"}]}
"""

from __future__ import annotations

import json
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict

from asymtrack_edge.files import OutputFile, printable
from asymtrack_edge.runtime.outputs.base import Result, Sink


def csv_header(several: bool = False, pts: bool = False) -> str:
    """The first line of a csv file; see ``csv_rows``."""
    return "frame,x,y,w,h,score,state" + ",target" * several + ",pts" * pts + "\n"


def csv_rows(result: Result, several: bool = False, pts: bool = False) -> str:
    """A row per target of a frame.

    Args:
        result: of the frame, counted from 0.
        several: add a column ``target``.
        pts: add a column ``pts``: seconds on the source's own clock, empty where it has none.
    """
    end = f",{'' if result.frame.pts is None else f'{result.frame.pts:.6f}'}" if pts else ""
    rows = ""
    for number, track in result.tracks.items():
        x, y, w, h = track.box
        target = f",{number}" if several else ""
        rows += f"{result.frame.number},{x:.2f},{y:.2f},{w:.2f},{h:.2f},{track.score:.4f},{track.state.value}"
        rows += f"{target}{end}\n"
    return rows


def as_message(result: Result) -> Dict[str, Any]:
    """The object of a frame, ready for JSON. ``time`` is when the frame arrived, in Unix seconds."""
    image, pts = result.frame.image, result.frame.pts
    return {
        "frame": result.frame.number,
        "time": round(result.frame.time, 6),
        "pts": None if pts is None else round(pts, 6),
        "age_ms": round(1000 * result.latency, 3),
        "size": [0, 0] if image is None else [image.shape[1], image.shape[0]],
        "targets": [
            {
                "id": number,
                "box": [round(v, 2) for v in track.box],
                "score": round(track.score, 4),
                "state": track.state.value,
            }
            for number, track in result.tracks.items()
        ],
    }


def as_json(result: Result) -> str:
    """The object of a frame as one line of JSON."""
    return json.dumps(as_message(result), separators=(",", ":"), allow_nan=False) + "\n"


class RowWriter(Sink):
    """A text file that grows by whole rows.

    Each row goes to the system at once: a process that is killed loses none. A row that does not
    fit on the disk any more is taken back as a whole.

    Args:
        path: of the file.
        rows: the text of a frame.
        header: the text before the first.
    """

    def __init__(self, path: Path, rows: Callable[[Result], str], header: str = "") -> None:
        self.name = printable(path)
        self._rows, self._header = rows, header
        self._file = OutputFile(path)

    def write(self, result: Result) -> None:
        """Adds the frame's rows."""
        self._file.write((self._header + self._rows(result)).encode())
        self._header = ""

    def close(self) -> None:
        """Completes the file."""
        self._file.close()

    def discard(self) -> None:
        """Leaves an earlier file as it was."""
        self._file.discard()


def box_writer(path: Path, several: bool = False, pts: bool = False) -> RowWriter:
    """Writes boxes as csv; the columns are those of ``csv_rows``."""
    return RowWriter(path, partial(csv_rows, several=several, pts=pts), csv_header(several, pts))
