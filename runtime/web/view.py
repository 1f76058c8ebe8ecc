"""The web view of a run: watch it and draw targets from any browser.

The server (Starlette) runs on its own thread. The tracker's thread only hands it the newest result. The picture
is encoded on a third thread: at most once per ``PERIOD``, once for all viewers, and only if a viewer has shown
the previous one. So neither slow nor additional viewers slow the tracker down, and pictures never pile up.
"""

from __future__ import annotations

import asyncio
import json
import operator
import socket
import threading
from collections import deque
from concurrent.futures import TimeoutError as FutureTimeout
from contextlib import suppress
from dataclasses import replace
from functools import partial
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Callable, Deque, Dict, NamedTuple, Optional, Tuple

import cv2
import numpy as np
import uvicorn
import websockets  # noqa: F401  (uvicorn serves no WebSocket without it, and does not say so)
from starlette.applications import Starlette
from starlette.concurrency import run_in_threadpool
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect
from uvicorn.protocols.http.h11_impl import H11Protocol

from asymtrack_edge.errors import AsymTrackError, BackendError, SourceError, UsageError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.outputs import Result, Sink
from asymtrack_edge.runtime.outputs.rows import as_message, csv_header, csv_rows
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.tracker import State, Track
from asymtrack_edge.runtime.web import access

PERIOD = 1 / 15  #: shortest time between two pictures for a viewer, in seconds; the tracker may be faster
WIDTH = 960  #: greatest width of pictures for viewers, in pixels
MOST_TARGETS = 32  #: targets followed at once through the page
MOST_ROWS = 300_000  #: rows kept for ``/boxes.csv``, some 30 MB: a run that never ends must not fill the memory
MOST_CONNECTIONS = 512  #: connections open at once; more are closed, or strangers could use up all descriptors
LONGEST_MESSAGE = 1 << 16  #: from a browser, in bytes; a longer one closes its connection
SILENCE = 30.0  #: seconds without a frame after which a live source's run counts as unhealthy

_PAGE = Path(__file__).parent / "page"
_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Shown(NamedTuple):
    """A picture as sent to viewers, and the result and image (BGR uint8) that it shows.

    The packet consists of the header's length (4 bytes, big-endian), the header in JSON, and a JPEG.
    """

    packet: bytes
    result: Result
    image: np.ndarray


class Command(NamedTuple):
    """A message from a browser.

    ``ack``: the last picture has been shown. ``hold``: the user began to draw on a picture. ``mark``: a
    box was drawn. ``remove``, ``pause``, ``resume``, ``step``, ``end``.
    """

    action: str
    frame: Optional[int] = None  #: number of the picture concerned, for hold and mark
    box: Optional[Box] = None  #: in frame pixels, for mark; not yet checked
    target: Optional[int] = None  #: id, for remove, and for mark if an existing target is moved


def parse_command(text: str) -> Command:
    """Reads a message such as ``{"action": "mark", "frame": 17, "box": [10, 20, 30, 40]}``."""
    try:
        content = json.loads(text)
        command = Command(content["action"])
        if command.action not in ("ack", "hold", "mark", "remove", "pause", "resume", "step", "end"):
            raise ValueError
        if command.action in ("hold", "mark"):
            command = command._replace(frame=operator.index(content["frame"]))
        if command.action == "mark":
            command = command._replace(box=Box(*(n + 0.0 for n in content["box"])))  # + 0.0: no text
        if command.action == "remove" or content.get("target") is not None:
            command = command._replace(target=operator.index(content["target"]))
        return command
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise UsageError('a message is JSON such as {"action": "mark", "frame": 17, "box": [10, 20, 30, 40]}') from None


class WebView(Sink):
    """Serves the page; a sink of the run that it shows.

    Unless ``host`` is reachable from this machine only, requests need a token: that of the environment
    variable ``ASYMTRACK_TOKEN``, or a new one. ``url`` is the address for a browser, token included.
    """

    name = "web view"

    def __init__(self, run: Run, port: int, host: str = "127.0.0.1") -> None:
        self.run = run
        self.token = None if access.is_loopback(host) else access.make_token()
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
            http=_Bounded,
            backlog=64,  # connections that asyncio accepts before it asks the protocol about the first of them
            timeout_graceful_shutdown=1,
            ws_max_size=LONGEST_MESSAGE,
            ws_per_message_deflate=False,  # JPEGs do not compress further
        )
        self._server = uvicorn.Server(config)
        self._thread = threading.Thread(target=self._server.run, args=([self._socket],), name="web view", daemon=True)
        self._thread.start()
        while not self._server.started:
            if not self._thread.is_alive():
                raise BackendError("the web server did not start: see above")
            sleep(0.01)

    def write(self, result: Result) -> None:
        """Keeps the result's rows; the server takes the result itself from the run."""
        self.rows.extend(csv_rows(result, several=True).splitlines(keepends=True))

    def close(self, keep: bool = True) -> None:
        self._server.should_exit = True
        self._thread.join(3)
        self._socket.close()

    def newest(self) -> Optional[Shown]:
        """The newest picture with its header, encoded when it is first asked for."""
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
            jpeg = cv2.imencode(".jpg", picture, [cv2.IMWRITE_JPEG_QUALITY, 75])[1].tobytes()
            header = json.dumps(self._header(result)).encode()
            self._encoded = Shown(len(header).to_bytes(4, "big") + header + jpeg, result, image)
            return self._encoded

    def handle(self, command: Command, held: Optional[np.ndarray]) -> Dict[str, Any]:
        """Carries out a browser's command, waiting for the tracker; ``held`` is the frame that a box was drawn on."""
        run = self.run
        actions: Dict[str, Callable[[], Any]] = {
            "mark": lambda: self._mark(command, held),
            "remove": lambda: self._remove(command.target),
            "pause": lambda: run.pause(True),
            "resume": lambda: run.pause(False),
            "step": lambda: run.pause(True, step=True),
        }
        if command.action == "end":  # a silent source gives no frame to wait for
            run.end()
            run.reader.close()
            return {"done": "end", "target": None, "paused": run.paused}
        try:
            done = run.submit(actions[command.action]).result(timeout=10)
        except FutureTimeout:
            raise SourceError("the source gives no frames now: the command waits for the next one") from None
        return {"done": command.action, "target": done, "paused": run.paused}

    def _mark(self, command: Command, held: Optional[np.ndarray]) -> int:
        """Runs on the tracker's thread."""
        tracker, box, target = self.run.tracker, command.box, command.target
        if held is None or box is None:
            # Another frame will not do: something else may be in that place by now.
            raise UsageError("that picture is no longer available: draw the box again")
        if target is not None and target in tracker:
            tracker.reset(target, held, box)
        elif len(tracker) >= MOST_TARGETS:
            raise UsageError(f"no more than {MOST_TARGETS} targets: remove one first")
        else:
            target = tracker.add(held, box)
        self._show({target: Track(box, 1.0, State.TRACKING)})
        return target

    def _remove(self, target: Any) -> int:
        """Runs on the tracker's thread."""
        self.run.tracker.remove(target)
        self._show({})
        return target

    def _show(self, new: Dict[int, Track]) -> None:
        """Shows the current targets in the latest frame, before the next one arrives."""
        latest = self.run.latest
        assert latest is not None  # a run takes its first frame before it is shown
        tracks = {target: track for target, track in {**latest.tracks, **new}.items() if target in self.run.tracker}
        self.run.latest = replace(latest, tracks=tracks)

    def _header(self, result: Result) -> Dict[str, Any]:
        run, source = self.run, self.run.reader.source
        return {
            **as_message(result),
            "count": run.count,
            "seconds": run.tracker.seconds,
            "dropped": run.reader.dropped,
            "paused": run.paused,
            "over": run.source_ended,
            "live": source.live,
            "source": source.name,
            "length": source.length,
            "backend": run.tracker.backend.name,
        }


class _Bounded(H11Protocol):
    """HTTP for at most ``MOST_CONNECTIONS``: uvicorn's own limit counts a connection only once it asks something."""

    def connection_made(self, transport: asyncio.Transport) -> None:  # type: ignore[override]
        super().connection_made(transport)
        if len(self.connections) > MOST_CONNECTIONS:
            transport.abort()


def make_app(view: WebView) -> ASGIApp:
    """The ASGI application, which answers only requests that ``access.refusal`` allows."""

    async def page(name: str, kind: str, request: Request) -> Response:
        response = FileResponse(_PAGE / name, media_type=kind, headers=_HEADERS)
        if view.token is not None and kind == "text/html":
            response.set_cookie(access.cookie_name(view.token), view.token, httponly=True, samesite="strict")
        return response

    async def boxes(request: Request) -> Response:
        headers = {**_HEADERS, "Content-Disposition": 'attachment; filename="boxes.csv"'}
        return Response("".join([csv_header(several=True), *view.rows]), media_type="text/csv", headers=headers)

    async def health(request: Request) -> Response:
        latest = view.run.latest
        silent = view.run.reader.source.live and not view.run.source_ended and latest and latest.frame.age > SILENCE
        answer = {"status": "no frames" if silent else "ok", "frames": view.run.count}
        return JSONResponse(answer, 503 if silent else 200)

    routes = [
        Route("/", partial(page, "index.html", "text/html")),
        Route("/app.js", partial(page, "app.js", "text/javascript")),
        Route("/style.css", partial(page, "style.css", "text/css")),
        Route("/boxes.csv", boxes),
        Route("/health", health),
        WebSocketRoute("/view", lambda socket: _Viewer(view, socket).serve()),
    ]
    app = Starlette(routes=routes)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        problem = access.refusal(HTTPConnection(scope), view.token) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4403})
        else:
            await PlainTextResponse(problem + "\n", 403)(scope, receive, send)

    return guarded


class _Viewer:
    """One open page: pictures are sent one at a time, each after the previous one was shown."""

    def __init__(self, view: WebView, socket: WebSocket) -> None:
        self._view = view
        self._socket = socket
        self._sending = asyncio.Lock()
        self._shown = asyncio.Event()
        #: The page shows one of the last two pictures that were sent, or the one that it holds while drawing.
        self._sent: Deque[Tuple[int, np.ndarray]] = deque(maxlen=2)
        self._held: Tuple[Optional[int], Optional[np.ndarray]] = (None, None)

    async def serve(self) -> None:
        """Serves the page until it is closed."""
        await self._socket.accept()
        self._shown.set()
        feeding = asyncio.ensure_future(self._feed())
        try:
            await self._listen()
        except (WebSocketDisconnect, RuntimeError, KeyError):
            pass  # closed by the browser, perhaps during a send; KeyError: bytes instead of text
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            with suppress(RuntimeError, WebSocketDisconnect):  # already closed
                await self._socket.close()

    async def _feed(self) -> None:
        sent = None
        while True:
            await self._shown.wait()
            if self._view.run.latest is not sent:
                newest = await run_in_threadpool(self._view.newest)
                if newest is not None and newest.result is not sent:
                    sent = newest.result
                    self._sent.append((sent.frame.number, newest.image))
                    self._shown.clear()
                    async with self._sending:
                        await self._socket.send_bytes(newest.packet)
            await asyncio.sleep(PERIOD)

    def _known(self, number: Optional[int]) -> Optional[np.ndarray]:
        """A frame that the page may be showing, by its number."""
        return next((image for known, image in (self._held, *reversed(self._sent)) if known == number), None)

    async def _listen(self) -> None:
        while True:
            text = await self._socket.receive_text()
            try:
                command = parse_command(text)
                if command.action == "ack":
                    self._shown.set()
                    continue
                if command.action == "hold":
                    self._held = command.frame, self._known(command.frame)
                    continue
                answer = await run_in_threadpool(self._view.handle, command, self._known(command.frame))
            except AsymTrackError as error:
                answer = {"error": str(error)}
            async with self._sending:
                await self._socket.send_json(answer)


def _listen(host: str, port: int) -> socket.socket:
    try:
        family, *_, address = socket.getaddrinfo(host, port, type=socket.SOCK_STREAM)[0]
        return socket.create_server(address, family=family, dualstack_ipv6=family == socket.AF_INET6)
    except (OSError, UnicodeError) as error:  # UnicodeError: not a host name
        reason = getattr(error, "strerror", None) or error
        raise SourceError(f"cannot serve the web view on {host}:{port}: {reason}") from None
