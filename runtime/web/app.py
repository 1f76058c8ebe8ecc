"""The web view's routes (Starlette); ``view`` has what they show."""

from __future__ import annotations

import asyncio
from collections import deque
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any, Awaitable, Callable, Deque, Optional, Tuple

import numpy as np
from starlette.applications import Starlette
from starlette.requests import Request
from starlette.responses import FileResponse, JSONResponse, PlainTextResponse, Response
from starlette.routing import Route, WebSocketRoute
from starlette.types import ASGIApp, Receive, Scope, Send
from starlette.websockets import WebSocket, WebSocketDisconnect

from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.runtime.outputs import Result
from asymtrack_edge.runtime.outputs.rows import csv_header
from asymtrack_edge.runtime.web.protocol import PERIOD, cookie_name, parse_wish, refusal

if TYPE_CHECKING:
    from asymtrack_edge.runtime.web.view import WebView

_PAGE = Path(__file__).parent / "page"

_HEADERS = {
    "Content-Security-Policy": "default-src 'self'; img-src 'self' blob: data:; frame-ancestors 'none'",
    "X-Content-Type-Options": "nosniff",
    "Referrer-Policy": "no-referrer",
    "Cache-Control": "no-store",
}

#: Frames that wait for a program that reads ``/tracks`` slowly; older ones are dropped.
_BACKLOG = 64


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
        return JSONResponse({"status": "ok", "frames": view.run.count})

    async def pictures(socket: WebSocket) -> None:
        await _until_gone(socket, _Viewer(view, socket).run)

    async def tracks(socket: WebSocket) -> None:
        """Every frame's JSON, for programs."""
        waiting: asyncio.Queue[str] = asyncio.Queue(_BACKLOG)

        def tell(text: str) -> None:
            if waiting.full():
                waiting.get_nowait()
            waiting.put_nowait(text)

        async def feed() -> None:
            while True:
                await socket.send_text(await waiting.get())

        async def drain() -> None:
            while True:  # notices that the other side has gone
                await socket.receive_text()

        view.listeners.add(tell)
        try:
            await _until_gone(socket, lambda: _first_to_end(feed(), drain()))
        finally:
            view.listeners.discard(tell)

    routes = [
        Route("/", partial(page, "index.html", "text/html")),
        Route("/app.js", partial(page, "app.js", "text/javascript")),
        Route("/style.css", partial(page, "style.css", "text/css")),
        Route("/boxes.csv", boxes),
        Route("/health", health),
        WebSocketRoute("/view", pictures),
        WebSocketRoute("/tracks", tracks),
    ]
    app = Starlette(routes=routes)

    async def guarded(scope: Scope, receive: Receive, send: Send) -> None:
        problem = refusal(dict(scope), view.token) if scope["type"] in ("http", "websocket") else None
        if problem is None:
            await app(scope, receive, send)
        elif scope["type"] == "websocket":
            await send({"type": "websocket.close", "code": 4403})
        else:
            await PlainTextResponse(problem + "\n", 403)(scope, receive, send)

    return guarded


async def _until_gone(socket: WebSocket, work: Callable[[], Awaitable[None]]) -> None:
    try:
        await socket.accept()
        await work()
    except (WebSocketDisconnect, RuntimeError, KeyError):
        pass  # closed by the other side, perhaps in the middle of a send; KeyError: bytes for text
    finally:
        with suppress(RuntimeError, WebSocketDisconnect):  # closed already
            await socket.close()


async def _first_to_end(*jobs: Any) -> None:
    """Runs all until one ends or fails, then ends the others."""
    tasks = [asyncio.ensure_future(job) for job in jobs]
    try:
        done, _ = await asyncio.wait(tasks, return_when=asyncio.FIRST_COMPLETED)
        for task in done:
            task.result()
    finally:
        for task in tasks:
            task.cancel()
        await asyncio.gather(*tasks, return_exceptions=True)


class _Viewer:
    """One open page: pictures go out one at a time, each when the last has been shown."""

    def __init__(self, view: WebView, socket: WebSocket) -> None:
        self._view = view
        self._socket = socket
        self._sending = asyncio.Lock()
        self._shown = asyncio.Event()
        #: The page shows one of the last two pictures that it was sent, or one that it holds.
        self._sent: Deque[Tuple[int, Optional[np.ndarray]]] = deque(maxlen=2)
        self._held: Tuple[Optional[int], Optional[np.ndarray]] = (None, None)

    async def run(self) -> None:
        """Until the page is closed."""
        self._shown.set()
        await _first_to_end(self._feed(), self._listen())

    async def _feed(self) -> None:
        sent: Optional[Result] = None
        while True:
            await self._shown.wait()
            if self._view.run.latest is not sent:
                newest = await self._elsewhere(self._view.newest)
                if newest.result is not sent:
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
