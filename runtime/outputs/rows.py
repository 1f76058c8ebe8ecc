"""A row or line per frame: boxes as csv and messages as JSON, into files, on stdout or by UDP.

A message is one JSON object (``docs/cameras.md`` documents it for other languages)::

    {"frame": 17, "time": 1760000000.123456, "pts": 0.567, "age_ms": 21.4, "size": [1280, 720],
     "targets": [{"id": 0, "box": [120.25, 80.5, 40.0, 60.0], "score": 0.9312, "state": "tracking"}]}
"""

from __future__ import annotations

import json
import socket
import sys
from functools import partial
from pathlib import Path
from typing import Any, Callable, Dict, Tuple
from urllib.parse import urlsplit

from asymtrack_edge.errors import SourceError, UsageError, without_secrets
from asymtrack_edge.files import OutputFile, printable
from asymtrack_edge.runtime.outputs.base import Result, Sink

#: A UDP datagram cannot be larger.
_MAX_DATAGRAM = 65507


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


class StdoutSender(Sink):
    """A line of JSON per frame on stdout, flushed, so that a reader sees each frame at once."""

    name = "stdout"

    def write(self, result: Result) -> None:
        """Prints the frame's line."""
        sys.stdout.write(as_json(result))
        sys.stdout.flush()


class UdpSender(Sink):
    """One datagram per frame; never waits.

    Attributes:
        failed: datagrams that the network did not take (nobody there, or its queue is full).
    """

    def __init__(self, host: str, port: int) -> None:
        self.name = f"udp://{host}:{port}"
        self.failed = 0
        try:
            family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_DGRAM)[0]
            self._socket = socket.socket(family, kind, protocol)
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
            self._socket.connect(address)
        except OSError as error:
            raise SourceError(f"cannot send to {self.name}: {error.strerror or error}") from None

    def write(self, result: Result) -> None:
        """Sends the frame's datagram; a receiver that starts later must find us still sending."""
        data = as_json(result).rstrip().encode()
        try:
            if len(data) > _MAX_DATAGRAM:
                raise OSError("too many targets for one datagram")
            self._socket.send(data)
        except OSError:
            self.failed += 1

    def close(self) -> None:
        """Closes the socket."""
        self._socket.close()


def open_sender(where: str) -> Sink:
    """A sink from what a user writes: ``-`` (stdout), ``udp://host:port`` or a file ``.jsonl``.

    Raises:
        UsageError: none of these, or the file cannot be written.
        SourceError: the host is unknown.
    """
    if where == "-":
        return StdoutSender()
    if where.startswith("udp://"):
        return UdpSender(*_host_port(where))
    if where.endswith((".jsonl", ".ndjson")):
        return RowWriter(Path(where), as_json)
    raise UsageError(f"--send takes - (stdout), udp://host:port or a file .jsonl, not {without_secrets(where)!r}")


def _host_port(url: str) -> Tuple[str, int]:
    try:
        parts = urlsplit(url)
        if not parts.hostname or not parts.port:
            raise ValueError
        return parts.hostname, parts.port
    except ValueError:
        raise UsageError(
            f"{without_secrets(url)!r} needs a host and a port, for example udp://192.168.1.20:5005"
        ) from None
