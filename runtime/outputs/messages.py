"""What a program is told about each frame: one JSON object, on stdout, into a file or by UDP.

The object (``docs/field.md`` documents it for other languages)::

    {"frame": 17, "time": 1760000000.123456, "age_ms": 21.4, "size": [1280, 720],
     "targets": [{"id": 0, "box": [120.25, 80.5, 40.0, 60.0], "score": 0.9312, "state": "tracking"}]}
"""

from __future__ import annotations

import json
import socket
import sys
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Dict, Tuple
from urllib.parse import urlsplit

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.runtime.outputs.files import RowFile, Sink
from asymtrack_edge.runtime.sources.capture import Captured
from asymtrack_edge.runtime.target import Track

#: A UDP datagram cannot be larger.
_MAX_DATAGRAM = 65507


@dataclass(frozen=True)
class Result:
    """What was decided on one frame.

    Attributes:
        frame: the frame, with its image.
        tracks: by target.
        latency: seconds from the frame's arrival in this process to the decision; for a file, whose
            frames wait for the tracker, from when it was taken up.
    """

    frame: Captured
    tracks: Dict[int, Track]
    latency: float


def as_message(result: Result) -> Dict[str, Any]:
    """The object of a frame, ready for JSON. ``time`` is when the frame arrived, in Unix seconds."""
    image = result.frame.image
    return {
        "frame": result.frame.number,
        "time": round(result.frame.time, 6),
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
    """The object of a frame as one line of JSON, without the line's end."""
    return json.dumps(as_message(result), separators=(",", ":"), allow_nan=False)


class StdoutSender(Sink):
    """A line of JSON per frame on stdout, flushed, so that a reader sees each frame at once."""

    name = "stdout"

    def write(self, result: Result) -> None:
        """See ``Sink``."""
        sys.stdout.write(as_json(result) + "\n")
        sys.stdout.flush()


class FileSender(Sink):
    """A line of JSON per frame in a file; see ``RowFile`` for what happens when the disk is full."""

    def __init__(self, path: Path) -> None:
        self.name = str(path)
        self._rows = RowFile(path)

    def write(self, result: Result) -> None:
        """See ``Sink``."""
        self._rows.append(as_json(result) + "\n")

    def close(self) -> None:
        """See ``Sink``."""
        self._rows.close()

    def discard(self) -> None:
        """See ``Sink``."""
        self._rows.discard()


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
        """See ``Sink``."""
        data = as_json(result).encode()
        try:
            if len(data) > _MAX_DATAGRAM:
                raise OSError("too many targets for one datagram")
            self._socket.send(data)
        except OSError:
            # A receiver that starts later must find us still sending.
            self.failed += 1

    def close(self) -> None:
        """See ``Sink``."""
        self._socket.close()


def open_sender(where: str) -> Sink:
    """A sink from what a user writes: ``-`` (stdout), ``udp://host:port`` or a file ``.jsonl``.

    Raises:
        UsageError: none of these.
        SourceError: the host is unknown.
    """
    if where == "-":
        return StdoutSender()
    if where.startswith("udp://"):
        return UdpSender(*_host_port(where))
    if where.endswith((".jsonl", ".ndjson")):
        return FileSender(Path(where))
    raise UsageError(f"--send takes - (stdout), udp://host:port or a file .jsonl, not {where!r}")


def _host_port(url: str) -> Tuple[str, int]:
    try:
        parts = urlsplit(url)
        if not parts.hostname or not parts.port:
            raise ValueError
        return parts.hostname, parts.port
    except ValueError:
        raise UsageError(f"{url!r} needs a host and a port, for example udp://192.168.1.20:5005") from None
