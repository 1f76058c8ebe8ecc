"""The web view's routes (Starlette): who may ask, what a browser may say. ``view`` has what they show and do."""

from __future__ import annotations

import asyncio
import hashlib
import hmac
import ipaddress
import json
import operator
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Callable, Deque, NamedTuple, Optional, Tuple
from urllib.parse import urlsplit

import numpy as np
from starlette.applications import Starlette
from starlette.requests import HTTPConnection, Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from asymtrack_edge.errors import AsymTrackError, UsageError
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime.outputs.rows import csv_header

if TYPE_CHECKING:
    from asymtrack_edge.runtime.web.view import WebView

#: Seconds between two pictures for a viewer, at least; the tracker is not held to it.
PERIOD = 1 / 15

#: Seconds without a frame after which a live source's run counts as unhealthy.
SILENCE = 30.0

_PAGE = Path(__file__).parent / "page"

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}


class Wish(NamedTuple):
    """A message of a browser.

    ``ack``: the last picture has been shown. ``hold``: the user began to draw on a picture. ``mark``: a
    box was drawn. ``remove``, ``pause``, ``resume``, ``step``, ``end``.
    """

    action: str
    frame: Optional[int] = None  #: number of the picture concerned, for hold and mark
    box: Optional[Box] = None  #: in frame pixels, for mark; not yet checked
    target: Optional[int] = None  #: its id, for remove, and for mark where an old target is moved


def parse_wish(text: str) -> Wish:
    """Reads a message such as ``{"action": "mark", "frame": 17, "box": [10, 20, 30, 40]}``."""
    try:
        content = json.loads(text)
        action, target = content["action"], content.get("target")
        if action not in ("ack", "hold", "mark", "remove", "pause", "resume", "step", "end"):
            raise ValueError
        return Wish(
            action,
            operator.index(content["frame"]) if action in ("hold", "mark") else None,
            Box(*map(float, content["box"])) if action == "mark" else None,
            None if target is None and action != "remove" else operator.index(target),
        )
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RecursionError):
        raise UsageError('a message is JSON such as {"action": "mark", "frame": 17, "box": [10, 20, 30, 40]}') from None


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cookie_name(token: str) -> str:
    """Each view's own: browsers do not keep cookies of two ports of one host apart."""
    return f"asymtrack_{hashlib.sha256(token.encode()).hexdigest()[:12]}"


def refusal(asking: HTTPConnection, token: Optional[str]) -> Optional[str]:
    """Why a request must not be answered; None if it may.

    Without a token only requests that name this machine itself are answered, so that no web page
    elsewhere can reach us by giving its own name our address. A WebSocket is opened only from the
    page that we served. Anybody may ask for ``/health``.
    """
    host, origin = asking.headers.get("host", ""), asking.headers.get("origin")
    try:
        asked, page = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
    except ValueError:
        return "the request's headers are malformed"
    if token is None and not is_loopback(asked or ""):
        return "this view answers to this machine only"
    if asking.scope["type"] == "websocket" and origin is not None and page != host:
        return "a page from elsewhere cannot connect"
    if token is None or asking.scope["path"] == "/health":
        return None
    offers = asking.query_params.get("token", ""), asking.cookies.get(cookie_name(token), "")
    if any(hmac.compare_digest(offer.encode(), token.encode()) for offer in offers):
        return None
    return "the token is missing or wrong: use the address that was printed when the view started"


def make_app(view: WebView) -> ASGIApp:
    """The ASGI application, behind the check of who may ask."""

    async def page(name: str, kind: str, request: Request) -> Response:
        response = FileResponse(_PAGE / name, media_type=kind, headers=_HEADERS)
        if view.token is not None and kind == "text/html":
            response.set_cookie(cookie_name(view.token), view.token, httponly=True, samesite="strict")
        return response

    async def boxes(request: Request) -> Response:
        headers = {**_HEADERS, "Content-Disposition": 'attachment; filename="boxes.csv"'}
        return Response("".join([csv_header(several=True), *view.rows]), media_type="text/csv", headers=headers)

    async def health(request: Request) -> Response:
        latest = view.run.latest
        silent = view.run.reader.source.live and latest is not None and latest.frame.age > SILENCE
        answer = {"status": "no frames" if silent else "ok", "frames": view.run.count}
        return JSONResponse(answer, 503 if silent else 200)

    async def pictures(socket: WebSocket) -> None:
        await _Viewer(view, socket).serve()

    routes = [
        Route("/", partial(page, "index.html", "text/html")),
        Route("/app.js", partial(page, "app.js", "text/javascript")),
        Route("/style.css", partial(page, "style.css", "text/css")),
        Route("/boxes.csv", boxes),
        Route("/health", health),
        WebSocketRoute("/view", pictures),
    ]
    app = Starlette(routes=routes)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        problem = refusal(HTTPConnection(scope), view.token) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4403})
        else:
            await PlainTextResponse(problem + "\n", 403)(scope, receive, send)

    return guarded


class _Viewer:
    """One open page: pictures go out one at a time, each when the last has been shown."""

    def __init__(self, view: WebView, socket: WebSocket) -> None:
        self._view = view
        self._socket = socket
        self._sending = asyncio.Lock()
        self._shown = asyncio.Event()
        #: The page shows one of the last two pictures that it was sent, or one that it holds.
        self._sent: Deque[Tuple[int, np.ndarray]] = deque(maxlen=2)
        self._held: Tuple[Optional[int], Optional[np.ndarray]] = (None, None)

    async def serve(self) -> None:
        """Until the page is closed."""
        await self._socket.accept()
        self._shown.set()
        feeding = asyncio.ensure_future(self._feed())
        try:
            await self._listen()
        except (WebSocketDisconnect, RuntimeError, KeyError):
            pass  # closed by the other side, perhaps in the middle of a send; KeyError: bytes for text
        finally:
            feeding.cancel()
            await asyncio.gather(feeding, return_exceptions=True)
            with suppress(RuntimeError, WebSocketDisconnect):  # closed already
                await self._socket.close()

    async def _feed(self) -> None:
        sent = None
        while True:
            await self._shown.wait()
            if self._view.run.latest is not sent:
                newest = await self._elsewhere(self._view.newest)
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
                wish = parse_wish(text)
                if wish.action == "ack":
                    self._shown.set()
                    continue
                if wish.action == "hold":
                    self._held = wish.frame, self._known(wish.frame)
                    continue
                answer = await self._elsewhere(partial(self._view.obey, wish, self._known(wish.frame)))
            except AsymTrackError as error:
                answer = {"error": str(error)}
            async with self._sending:
                await self._socket.send_json(answer)

    @staticmethod
    async def _elsewhere(work: Callable[[], Any]) -> Any:
        """Waits on a worker thread, so that the server goes on serving."""
        return await asyncio.get_running_loop().run_in_executor(None, work)
