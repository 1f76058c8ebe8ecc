"""The web view of a run: watch it and draw targets from any browser.

The server runs on a thread of its own. The tracker's thread only leaves it the newest result; the
picture is encoded on a third, at most once in ``PERIOD``, once for all viewers and only if one has
shown the picture before. So neither a slow nor a second viewer slows the tracker, and pictures never
pile up.
"""

from __future__ import annotations

import json
import os
import re
import secrets
import socket
import threading
from collections import deque
from concurrent.futures import TimeoutError as FutureTimeout
from dataclasses import replace
from time import monotonic, sleep
from typing import Any, Callable, Deque, Dict, NamedTuple, Optional

import cv2
import numpy as np
import uvicorn
import websockets  # noqa: F401  (uvicorn serves no WebSocket without it, and does not say so)

from asymtrack_edge.errors import BackendError, SourceError, UsageError
from asymtrack_edge.runtime.outputs import Result, Sink
from asymtrack_edge.runtime.outputs.rows import as_message, csv_rows
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.target import State, Track
from asymtrack_edge.runtime.web.app import PERIOD, Wish, is_loopback, make_app

#: Of pictures for viewers, in pixels at most.
WIDTH = 960
_JPEG = [cv2.IMWRITE_JPEG_QUALITY, 75]

#: A browser's message cannot be larger, in bytes; the server closes the connection of who tries.
MAX_MESSAGE = 1 << 16

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
    """A picture as viewers get it, and the result and image (BGR uint8) that it shows.

    The packet is the length of a header (4 bytes, big-endian), the header in JSON, and a JPEG.
    """

    packet: bytes
    result: Result
    image: np.ndarray


class WebView(Sink):
    """Serves the page; a sink of the run that it shows.

    Where ``host`` is not this machine only, requests must know a token: that of the environment
    variable ``ASYMTRACK_TOKEN``, or a new one. ``url`` is what to open in a browser, token included.
    """

    name = "web view"

    def __init__(self, run: Run, port: int, host: str = "127.0.0.1") -> None:
        self.run = run
        self.token = None if is_loopback(host) else _token()
        self._socket = _listen(host, port)
        address, port = self._socket.getsockname()[:2]
        shown = socket.gethostname() if address in ("0.0.0.0", "::") else address
        shown = f"[{shown}]" if ":" in shown else shown
        self.url = f"http://{shown}:{port}/" + (f"?token={self.token}" if self.token else "")
        self.rows: Deque[str] = deque(maxlen=MOST_ROWS)
        self._encoding = threading.Lock()
        self._encoded: Optional[Shown] = None
        self._encode_after = 0.0
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
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="web view", daemon=True)
        self._thread.start()
        deadline = monotonic() + 10
        while not self._server.started:
            if not self._thread.is_alive() or monotonic() > deadline:
                raise BackendError("the web server did not start: see above")
            sleep(0.01)

    def write(self, result: Result) -> None:
        """Keeps the result's rows; the server takes the result itself from the run."""
        self.rows.extend(csv_rows(result, several=True).splitlines(keepends=True))

    def close(self) -> None:
        """Ends the server."""
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()

    def newest(self) -> Optional[Shown]:
        """The newest picture with its header, encoded if nobody has asked for it before."""
        with self._encoding:
            result, now = self.run.latest, monotonic()
            known = self._encoded is not None and self._encoded.result is result
            if known or now < self._encode_after or result is None or result.frame.image is None:
                return self._encoded
            self._encode_after = now + PERIOD
            image = np.asarray(result.frame.image)
            height, width = image.shape[:2]
            small = (WIDTH, max(1, round(height * WIDTH / width)))
            picture = cv2.resize(image, small, interpolation=cv2.INTER_AREA) if width > WIDTH else image
            jpeg = cv2.imencode(".jpg", picture, _JPEG)[1].tobytes()
            header = json.dumps(self._header(result)).encode()
            self._encoded = Shown(len(header).to_bytes(4, "big") + header + jpeg, result, image)
            return self._encoded

    def obey(self, wish: Wish, held: Optional[np.ndarray]) -> Dict[str, Any]:
        """Does what a browser asks for, which waits for the tracker's thread; ``held``: what a box was drawn on."""
        run = self.run
        actions: Dict[str, Callable[[], Any]] = {
            "mark": lambda: self._mark(wish, held),
            "remove": lambda: self._remove(wish.target),
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
        tracker, box, number = self.run.tracker, wish.box, wish.target
        if held is None or box is None:
            # Not from another frame instead: something else may be in that place by now.
            raise UsageError("that picture is not known any more: draw the box again")
        if number is not None and number in tracker:
            tracker.reset(number, held, box)
        elif len(tracker) >= MOST_TARGETS:
            raise UsageError(f"no more than {MOST_TARGETS} targets: remove one first")
        else:
            number = tracker.add(held, box)
        self._show({number: Track(box, 1.0, State.TRACKING)})
        return number

    def _remove(self, number: Any) -> int:
        """Runs on the tracker's thread."""
        self.run.tracker.remove(number)
        self._show({})
        return number

    def _show(self, new: Dict[int, Track]) -> None:
        """Shows the targets as they are now in the latest frame, before the next one comes."""
        latest = self.run.latest
        assert latest is not None  # a run takes its first frame before it is shown
        tracks = {number: track for number, track in {**latest.tracks, **new}.items() if number in self.run.tracker}
        self.run.latest = replace(latest, tracks=tracks)

    def _header(self, result: Result) -> Dict[str, Any]:
        run, source = self.run, self.run.reader.source
        return {
            **as_message(result),
            "count": run.count,
            "seconds": run.tracker.seconds,
            "dropped": run.reader.dropped,
            "paused": run.paused,
            "live": source.live,
            "source": source.name,
            "length": source.length,
            "backend": run.tracker.backend.name,
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
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, dualstack_ipv6=family == socket.AF_INET6)
    except OSError as error:
        raise SourceError(f"cannot serve the web view on {host}:{port}: {error.strerror or error}") from None
