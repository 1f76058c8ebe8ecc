"""The web view of a run: watch it and draw targets from any browser.

The server runs on a thread of its own. The tracker's thread only leaves it the newest result; the
picture is encoded on a third, at most once in ``PERIOD``, once for all viewers and only if one has
shown the picture before. So neither a slow nor a second viewer slows the tracker, and pictures never
pile up.
"""

from __future__ import annotations

import asyncio
import os
import re
import secrets
import socket
import threading
from collections import deque
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from time import monotonic, sleep
from typing import Any, Callable, Deque, Dict, NamedTuple, Optional, Set

import cv2
import numpy as np

from asymtrack_edge.errors import BackendError, MissingDependencyError, SourceError, UsageError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.outputs import Result, Sink
from asymtrack_edge.runtime.outputs.rows import as_json, as_message, csv_rows
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.target import State, Track
from asymtrack_edge.runtime.web.protocol import MAX_MESSAGE, PERIOD, Wish, is_loopback, pack_picture

#: Of pictures for viewers, in pixels at most.
WIDTH = 960
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 75]

#: Connections at once; more are answered 503.
MOST_CONNECTIONS = 512

#: Targets that can be followed at once through the page.
MOST_TARGETS = 32

#: Rows that are kept for ``/boxes.csv``, some 30 MB: a run that never ends must not fill the memory.
MOST_ROWS = 300_000

#: An environment variable for the token, so that a page and programs find the view again after a restart.
TOKEN_VARIABLE = "ASYMTRACK_TOKEN"
_SHORTEST_TOKEN = 16


class Shown(NamedTuple):
    """A picture as viewers get it: the packet to send, and the result and image (BGR uint8) that it shows."""

    packet: bytes = b""
    result: Optional[Result] = None
    image: Optional[np.ndarray] = None


class WebView(Sink):
    """Serves the page; a sink of the run that it shows.

    Where ``host`` is not this machine only, requests must know a token: that of the environment
    variable ``ASYMTRACK_TOKEN``, or a new one.

    Attributes:
        url: what to open in a browser, token included.
        listeners: called on the server's thread with every frame's JSON.
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
        self.rows: Deque[str] = deque(maxlen=MOST_ROWS)
        self.listeners: Set[Callable[[str], None]] = set()
        self._rates: Dict[str, Any] = {"fps": 0.0, "stages": {}}
        self._measured = monotonic(), run.count, run.tracker.seconds
        self._encoding = threading.Lock()
        self._encoded = Shown()
        self._encode_began = self._encode_seconds = 0.0
        config = uvicorn.Config(
            make_app(self),
            log_level="error",
            access_log=False,
            lifespan="off",
            limit_concurrency=MOST_CONNECTIONS,
            timeout_graceful_shutdown=1,
            ws_max_size=MAX_MESSAGE,
            ws_per_message_deflate=False,  # JPEGs do not get smaller
        )
        self._server = uvicorn.Server(config)
        self._loop: Optional[asyncio.AbstractEventLoop] = None
        self._thread = threading.Thread(target=lambda: asyncio.run(self._serve()), name="web view", daemon=True)
        self._thread.start()
        deadline = monotonic() + 10
        while not self._server.started:
            if not self._thread.is_alive() or monotonic() > deadline:
                raise BackendError("the web server did not start: see above")
            sleep(0.01)

    async def _serve(self) -> None:
        self._loop = asyncio.get_running_loop()
        await self._server.serve(sockets=[self._socket])

    def write(self, result: Result) -> None:
        """Leaves the result for the server."""
        self.rows.extend(csv_rows(result, several=True).splitlines(keepends=True))
        if self.listeners and self._loop is not None:
            text = as_json(result).rstrip()
            with suppress(RuntimeError):  # the server has just ended
                self._loop.call_soon_threadsafe(lambda: [tell(text) for tell in list(self.listeners)])

    def close(self) -> None:
        """Ends the server."""
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()

    def newest(self) -> Shown:
        """The newest picture with its header, encoded if nobody has asked for it before."""
        with self._encoding:
            result, began = self.run.latest, monotonic()
            known = self._encoded.result is result or began < self._encode_began + PERIOD
            if known or result is None or result.frame.image is None:
                return self._encoded
            self._encode_began = began
            image = np.asarray(result.frame.image)
            height, width = image.shape[:2]
            small = (WIDTH, max(1, round(height * WIDTH / width)))
            picture = cv2.resize(image, small, interpolation=cv2.INTER_AREA) if width > WIDTH else image
            good, jpeg = cv2.imencode(".jpg", picture, _JPEG)
            if good:
                self._encoded = Shown(pack_picture(self._header(result), jpeg.tobytes()), result, image)
                self._encode_seconds = monotonic() - began
            return self._encoded

    def obey(self, wish: Wish, held: Optional[np.ndarray]) -> Dict[str, Any]:
        """Does what a browser asks for, which waits for the tracker's thread; ``held``: what a box was drawn on."""
        run = self.run
        actions: Dict[str, Callable[[], Any]] = {
            "mark": lambda: self._mark(wish, held),
            "remove": lambda: self._remove(wish),
            "pause": lambda: run.pause(True),
            "resume": lambda: run.pause(False),
            "step": lambda: run.pause(True, step=True),
            "end": run.end,
        }
        try:
            done = run.submit(actions[wish.action]).result(timeout=10)
        except FutureTimeout:
            raise SourceError("the source gives no frames now: this happens with the next") from None
        return {"done": wish.action, "target": done, "paused": run.paused}

    def _mark(self, wish: Wish, held: Optional[np.ndarray]) -> int:
        """Runs on the tracker's thread."""
        tracker = self.run.tracker
        if held is None or wish.box is None:
            # Not from another frame instead: something else may be in that place by now.
            raise UsageError("that picture is not known any more: draw the box again")
        if wish.target is not None and wish.target in tracker:
            number = wish.target
            tracker.reset(number, held, wish.box)
        elif len(tracker) >= MOST_TARGETS:
            raise UsageError(f"no more than {MOST_TARGETS} targets: remove one first")
        else:
            number = tracker.add(held, wish.box)
        self._show({**self._tracks(), number: Track(Box(*wish.box), 1.0, State.TRACKING)})
        return number

    def _remove(self, wish: Wish) -> Optional[int]:
        """Runs on the tracker's thread."""
        assert wish.target is not None  # the protocol refuses such a wish
        self.run.tracker.remove(wish.target)
        self._show({number: track for number, track in self._tracks().items() if number != wish.target})
        return wish.target

    def _tracks(self) -> Dict[int, Track]:
        return self.run.latest.tracks if self.run.latest is not None else {}

    def _show(self, tracks: Dict[int, Track]) -> None:
        """Shows other targets in the latest frame, before the next one comes."""
        if self.run.latest is not None:
            self.run.latest = Result(self.run.latest.frame, tracks, self.run.latest.latency)

    def _speed(self) -> Dict[str, Any]:
        """Frames per second and milliseconds by stage, over a second or more in which somebody looked."""
        now, count, seconds = monotonic(), self.run.count, self.run.tracker.seconds
        since, before, spent = self._measured
        if now - since >= 1:
            if now - since < 5 and count > before:  # else nobody looked, or the run was paused
                stages = {name: value - spent.get(name, 0.0) for name, value in seconds.items()}
                self._rates = {
                    "fps": round((count - before) / (now - since), 1),
                    "stages": {name: round(1000 * value / (count - before), 2) for name, value in stages.items()},
                }
            self._measured = now, count, seconds
        return self._rates

    def _header(self, result: Result) -> Dict[str, Any]:
        source = self.run.reader.source
        return {
            **as_message(result),
            **self._speed(),
            "dropped": self.run.reader.dropped,
            "encode_ms": round(1000 * self._encode_seconds, 2),
            "paused": self.run.paused,
            "live": source.live,
            "source": source.name,
            "length": source.length,
            "backend": self.run.tracker.backend.name,
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
