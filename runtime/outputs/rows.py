"""Text outputs: boxes as CSV and messages as JSON (to files, stdout or UDP), and progress on a terminal.

A message is one JSON object, which ``docs/cameras.md`` describes with an example.
"""

from __future__ import annotations

import json
import socket
from contextlib import suppress
from pathlib import Path
from typing import Any, Callable, Dict, Optional
from urllib.parse import urlsplit

from asymtrack_edge import cli
from asymtrack_edge.errors import SourceError, UsageError, without_secrets
from asymtrack_edge.files import OutputFile, printable
from asymtrack_edge.runtime.outputs import Result, Sink


def csv_header(several: bool, pts: bool = False) -> str:
    """The first line of a CSV file."""
    return "frame,x,y,w,h,score,state" + ",target" * several + ",pts" * pts + "\n"


def csv_rows(result: Result, several: bool, pts: bool = False) -> str:
    """A row per target of a frame; with ``pts`` a last column in seconds on the source's own clock."""
    end = f",{'' if result.frame.pts is None else f'{result.frame.pts:.6f}'}" if pts else ""
    rows = ""
    for target, track in result.tracks.items():
        x, y, w, h = track.box
        rows += f"{result.frame.number},{x:.2f},{y:.2f},{w:.2f},{h:.2f},{track.score:.4f},{track.state.value}"
        rows += f",{target}{end}\n" if several else f"{end}\n"
    return rows


def as_message(result: Result) -> Dict[str, Any]:
    """A frame's message as a dict, ready for JSON. ``time`` is when the frame arrived, in Unix seconds."""
    image, pts = result.frame.image, result.frame.pts
    return {
        "frame": result.frame.number,
        "time": round(result.frame.time, 6),
        "pts": None if pts is None else round(pts, 6),
        "age_ms": round(1000 * result.latency, 3),
        "size": [0, 0] if image is None else [image.shape[1], image.shape[0]],
        "targets": [
            {
                "id": target,
                "box": [round(v, 2) for v in track.box],
                "score": round(track.score, 4),
                "state": track.state.value,
            }
            for target, track in result.tracks.items()
        ],
    }


def as_json(result: Result) -> str:
    """A frame's message as one line of JSON."""
    return json.dumps(as_message(result), separators=(",", ":"), allow_nan=False) + "\n"


class RowWriter(Sink):
    """A text file: a header, then the ``rows`` of each frame.

    Each row is handed to the operating system at once, so that a killed process loses none. A row that
    no longer fits on the disk is removed as a whole.
    """

    def __init__(self, path: Path, rows: Callable[[Result], str], header: str = "") -> None:
        self.name = printable(path)
        self._rows, self._header, self._begun = rows, header, False
        self._file = OutputFile(path)

    def write(self, result: Result) -> None:
        self._file.write((self._header + self._rows(result)).encode())
        self._header, self._begun = "", True

    def close(self, keep: bool = True) -> None:
        """Completes the file; without ``keep``, or if nothing could be written, an earlier file stays."""
        self._file.close() if keep and self._begun else self._file.discard()


class _UdpSender(Sink):
    """Sends one datagram per frame; never waits."""

    def __init__(self, url: str) -> None:
        self.name = without_secrets(url)
        try:
            parts = urlsplit(url)
            if not parts.hostname or not parts.port:
                raise ValueError
            found = socket.getaddrinfo(parts.hostname, parts.port, type=socket.SOCK_DGRAM)
            family, *_, address = min(found, key=lambda entry: entry[0] != socket.AF_INET)  # localhost may be ::1
            self._address: Any = address
            self._socket = socket.socket(family, socket.SOCK_DGRAM)
            self._socket.setblocking(False)
            self._socket.setsockopt(socket.SOL_SOCKET, socket.SO_BROADCAST, 1)
        except OSError as error:
            raise SourceError(f"cannot send to {self.name}: {error.strerror or error}") from None
        except ValueError:
            raise UsageError(f"{self.name!r} needs a host and a port, for example udp://192.168.1.20:5005") from None

    def write(self, result: Result) -> None:
        with suppress(OSError):  # keep sending: a receiver may start later
            # A connected socket would keep the address that this machine had at first.
            self._socket.sendto(as_json(result).rstrip().encode(), self._address)

    def close(self, keep: bool = True) -> None:
        self._socket.close()


def open_sender(where: str) -> Sink:
    """Opens the message sink that a user names: ``-`` (stdout), ``udp://host:port`` or a ``.jsonl`` file."""
    if where.startswith("udp://"):
        return _UdpSender(where)
    if where == "-" or where.endswith((".jsonl", ".ndjson")):
        return RowWriter(Path("/dev/stdout" if where == "-" else where), as_json)
    raise UsageError(f"--send takes - (stdout), udp://10.0.0.2:5005 or a .jsonl file, not {without_secrets(where)!r}")


class Progress(Sink):
    """A progress bar on stderr, for a run of ``total`` frames."""

    name = "progress"
    essential = False

    def __init__(self, total: Optional[int]) -> None:
        self._bar = cli.progress(total=total, unit=" frames")

    def write(self, result: Result) -> None:
        """Shows the frame's number and the score and state of its first three targets, at most ten times a second."""
        tracks = [f"{track.score:.2f} {track.state.value}" for track in list(result.tracks.values())[:3]]
        self._bar.set_postfix_str(", ".join(tracks) or "no target", refresh=False)
        self._bar.update(result.frame.number + 1 - self._bar.n)

    def close(self, keep: bool = True) -> None:
        self._bar.close()
