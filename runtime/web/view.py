"""The web view of a run: watch it and draw targets from any browser.

The server runs on a thread of its own. The tracker's thread only leaves it the newest result; the
picture is encoded on a third, at most ``web_pictures.RATE`` times a second, once for all viewers and
only if one has shown the picture before. So neither a slow nor a second viewer slows the tracker,
and pictures never pile up.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import threading
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, Callable, Dict, Iterator, Optional, Set

import numpy as np

from asymtrack_edge.errors import BackendError, MissingDependencyError, SourceError, UsageError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.outputs.base import Result, Sink
from asymtrack_edge.runtime.outputs.rows import as_json, as_message, csv_rows
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.target import State, Track
from asymtrack_edge.runtime.web.boxes import BoxLog
from asymtrack_edge.runtime.web.pictures import Pictures, Rates, Shown
from asymtrack_edge.runtime.web.protocol import MAX_MESSAGE, Wish, is_loopback

#: Connections at once; more are answered 503.
MOST_CONNECTIONS = 512

#: An environment variable for the token, so that a page and programs find the view again after a restart.
TOKEN_VARIABLE = "ASYMTRACK_TOKEN"
_SHORTEST_TOKEN = 16

#: Targets that can be followed at once through the page.
MOST_TARGETS = 32


class WebView(Sink):
    """Serves the page; a sink of the run that it shows.

    Args:
        run: what it shows.
        port: to listen on; 0 for any that is free.
        host: address to listen on. Other than loopback, requests must know a token: that of the
            environment variable ``ASYMTRACK_TOKEN``, or a new one.

    Attributes:
        url: what to open in a browser, token included.
        token: None on loopback.

    Raises:
        MissingDependencyError: the extra ``web`` is not installed.
        SourceError: the address cannot be listened on.
        UsageError: the token of the environment is too short.
    """

    name = "web view"

    def __init__(self, run: Run, port: int, host: str = "127.0.0.1") -> None:
        try:
            import uvicorn
            import websockets  # noqa: F401  (uvicorn serves no WebSocket without it, and does not say so)

            from asymtrack_edge.runtime.web.app import make_app
        except ImportError as error:
            raise MissingDependencyError(error.name or "starlette", "web", "the web view") from None
        self.run = run
        self.token = None if is_loopback(host) else _token()
        self._socket = _listen(host, port)
        address, port = self._socket.getsockname()[:2]
        shown = {"0.0.0.0": socket.gethostname(), "::": socket.gethostname()}.get(address, address)
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"http://{shown}:{port}/" + (f"?token={self.token}" if self.token else "")
        self._version = 0
        self._result: Optional[Result] = None
        self._pictures = Pictures()
        self._wakers: Set[Callable[[], None]] = set()
        self._listeners: Set[Callable[[str], None]] = set()
        self._rates = Rates(run)
        self._boxes = BoxLog()
        self._server = uvicorn.Server(
            uvicorn.Config(
                make_app(self),
                log_level="error",
                access_log=False,
                lifespan="off",
                limit_concurrency=MOST_CONNECTIONS,
                timeout_graceful_shutdown=1,
                ws_max_size=MAX_MESSAGE,
                ws_per_message_deflate=False,  # JPEGs do not get smaller
            )
        )
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread = threading.Thread(target=self._serve, name="web view", daemon=True)
        self._thread.start()
        deadline = monotonic() + 10
        while not self._server.started:
            if not self._thread.is_alive() or monotonic() > deadline:
                raise BackendError("the web server did not start: see above")
            sleep(0.01)

    def _serve(self) -> None:
        async def serve() -> None:
            self._loop = asyncio.get_running_loop()
            await self._server.serve(sockets=[self._socket])

        asyncio.run(serve())

    def write(self, result: Result) -> None:
        """See ``Sink``. Costs the tracker's thread no more than waking the server's."""
        self._rates.count(result)
        with suppress(OSError):  # no room for the copy behind the download button: go on showing
            self._boxes.append(csv_rows(result, several=True).encode())
        self._publish(result)
        if self._listeners:
            text = as_json(result).rstrip()
            self._call(lambda: [tell(text) for tell in list(self._listeners)])

    def close(self) -> None:
        """See ``Sink``."""
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()
        self._boxes.close()

    # What follows is for the server's thread (``web_app``).

    def watch(self, wake: Callable[[], None]) -> Callable[[], None]:
        """Has ``wake`` called after every change; returns what ends that. On the server's thread."""
        self._wakers.add(wake)
        wake()
        return lambda: self._wakers.discard(wake)

    def listen(self, tell: Callable[[str], None]) -> Callable[[], None]:
        """Has ``tell`` called with every frame's JSON; returns what ends that."""
        self._listeners.add(tell)
        return lambda: self._listeners.discard(tell)

    @property
    def version(self) -> int:
        """Grows with every change of what there is to see."""
        return self._version

    def due_in(self) -> float:
        """Seconds until another picture may be encoded."""
        return self._pictures.due_in()

    def newest(self) -> Shown:
        """The newest picture with its header."""
        return self._pictures.show(self._version, self._result, self._header)

    def boxes(self) -> Iterator[bytes]:
        """The boxes so far as csv, a piece at a time."""
        return self._boxes.chunks()

    def obey(self, wish: Wish, held: Optional[np.ndarray]) -> Dict[str, Any]:
        """Does what a browser asks for; waits for the tracker's thread. Returns the answer to it.

        Args:
            wish: not an ack or hold.
            held: the frame a box was drawn on, for mark; None if it is not known any more.

        Raises:
            AsymTrackError: it cannot be done.
        """
        actions: Dict[str, Callable[[], Any]] = {
            "mark": lambda: self._mark(wish, held),
            "remove": lambda: self._remove(wish),
            "pause": lambda: self.run.pause(True),
            "resume": lambda: self.run.pause(False),
            "step": self.run.step,
            "end": self.run.end,
        }
        try:
            done = self.run.submit(actions[wish.action]).result(timeout=10)
        except FutureTimeout:
            raise SourceError("the source gives no frames now: this happens with the next") from None
        return {"done": wish.action, "target": done, "paused": self.run.paused}

    def _mark(self, wish: Wish, held: Optional[np.ndarray]) -> int:
        """Runs on the tracker's thread."""
        tracker, latest = self.run.tracker, self.run.latest
        if held is None or wish.box is None:
            # Not from another frame instead: something else may be in that place by now.
            raise UsageError("that picture is not known any more: draw the box again")
        if wish.target is not None and wish.target in tracker:
            tracker.reset(wish.target, held, wish.box)
            number = wish.target
        else:
            if len(tracker) >= MOST_TARGETS:
                raise UsageError(f"no more than {MOST_TARGETS} targets: remove one first")
            number = tracker.add(held, wish.box)
        if latest is not None:
            shown = {**latest.tracks, number: Track(Box(*wish.box), 1.0, State.TRACKING)}
            self._show_tracks(latest, shown)
        return number

    def _remove(self, wish: Wish) -> int:
        """Runs on the tracker's thread."""
        assert wish.target is not None
        self.run.tracker.remove(wish.target)
        latest = self.run.latest
        if latest is not None:
            self._show_tracks(latest, {n: t for n, t in latest.tracks.items() if n != wish.target})
        return wish.target

    def _show_tracks(self, latest: Result, tracks: Dict[int, Track]) -> None:
        self.run.latest = Result(latest.frame, tracks, latest.latency)
        self._publish(self.run.latest)

    def _publish(self, result: Result) -> None:
        self._result = result
        self._version += 1
        if self._wakers:
            self._call(lambda: [wake() for wake in list(self._wakers)])

    def _call(self, act: Callable[[], Any]) -> None:
        if self._loop is not None:
            with suppress(RuntimeError):  # the server has just ended
                self._loop.call_soon_threadsafe(act)

    def _header(self, result: Result) -> Dict[str, Any]:
        source = self.run.reader.source
        return {
            **as_message(result),
            **self._rates.shown(),
            "encode_ms": round(1000 * self._pictures.encode_seconds, 2),
            "paused": self.run.paused,
            "live": source.live,
            "source": source.name,
            "length": source.length,
            "backend": self.run.tracker.backend.description,
        }


def _token() -> str:
    given = os.environ.get(TOKEN_VARIABLE, "")
    if not given:
        return secrets.token_urlsafe(24)
    if len(given) < _SHORTEST_TOKEN or not re.fullmatch(r"[A-Za-z0-9_-]+", given):
        raise UsageError(
            f"{TOKEN_VARIABLE} takes at least {_SHORTEST_TOKEN} letters, digits, - or _: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return given


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, kind, protocol, _, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        listening = socket.socket(family, kind, protocol)
        listening.setsockopt(socket.SOL_SOCKET, socket.SO_REUSEADDR, 1)
        listening.bind(address)
        listening.listen(64)
    except OSError as error:
        reason = error.strerror or error
        raise SourceError(f"cannot serve the web view on {host}:{port} ({reason}): take another") from None
    return listening
