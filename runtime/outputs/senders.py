"""Messages to other programs: lines of JSON on stdout, into a file, or by UDP."""

from __future__ import annotations

import socket
import sys
from pathlib import Path
from typing import Tuple
from urllib.parse import urlsplit

from asymtrack_edge.errors import SourceError, UsageError, without_secrets
from asymtrack_edge.runtime.outputs.base import Result, Sink
from asymtrack_edge.runtime.outputs.rows import RowWriter, as_json

#: A UDP datagram cannot be larger.
_MAX_DATAGRAM = 65507


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
