"""What browsers and this program say to each other, and who may say anything.

Nothing here needs a web framework, so that all of it can be tested without one.
"""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import json
import struct
from http.cookies import CookieError, SimpleCookie
from typing import Any, Dict, Iterable, NamedTuple, Optional, Tuple
from urllib.parse import parse_qs, urlsplit

from asymtrack_edge.errors import UsageError

#: Seconds between two pictures for a viewer, at least; the tracker is not held to it.
PERIOD = 1 / 15

#: A browser's message cannot be larger, in bytes; the server closes the connection of who tries.
MAX_MESSAGE = 1 << 16

_ACTIONS = ("ack", "hold", "mark", "remove", "pause", "resume", "step", "end")


class Wish(NamedTuple):
    """A checked message of a browser.

    ``ack``: the last picture has been shown. ``hold``: the user began to draw on a picture. ``mark``: a
    box was drawn. ``remove``, ``pause``, ``resume``, ``step``, ``end``.
    """

    action: str
    frame: Optional[int] = None  #: number of the picture concerned, for hold and mark
    box: Optional[Tuple[float, float, float, float]] = None  #: x, y, w, h in frame pixels, for mark
    target: Optional[int] = None  #: its id, for remove, and for mark where an old target is moved


def parse_wish(text: str) -> Wish:
    """Reads a message such as ``{"action": "mark", "frame": 17, "box": [10, 20, 30, 40]}``."""
    try:
        content = json.loads(text)
    except (ValueError, RecursionError):
        content = None
    if not isinstance(content, dict) or content.get("action") not in _ACTIONS:
        raise UsageError(f"a message is a JSON object with an action: {', '.join(_ACTIONS)}")
    action, box = content["action"], content.get("box")
    numbers = {}
    for name, needed in (("frame", ("hold", "mark")), ("target", ("remove",))):
        value = numbers[name] = content.get(name)
        if (value is not None or action in needed) and (type(value) is not int or not 0 <= value < 1 << 53):
            raise UsageError(f"{name} is a whole number")
    if action != "mark":
        return Wish(action, **numbers)
    if not isinstance(box, list) or len(box) != 4 or not all(type(v) in (int, float) and abs(v) < 1e9 for v in box):
        raise UsageError("box is a list of four numbers")
    x, y, w, h = map(float, box)
    if w <= 0 or h <= 0:
        raise UsageError("a box has a positive width and height")
    return Wish(action, box=(x, y, w, h), **numbers)


def pack_picture(header: Dict[str, Any], jpeg: bytes) -> bytes:
    """A picture with what is known of it: length of the header (4 bytes, big-endian), header, JPEG."""
    text = json.dumps(header, separators=(",", ":")).encode()
    return b"".join((struct.pack(">I", len(text)), text, jpeg))


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cookie_name(token: str) -> str:
    """Each view's own: browsers do not keep cookies of two ports of one host apart."""
    return f"asymtrack_{hashlib.sha256(token.encode()).hexdigest()[:12]}"


def refusal(scope: Dict[str, Any], token: Optional[str]) -> Optional[str]:
    """Why a request must not be answered; None if it may.

    Without a token only requests that name this machine itself are answered, so that no web page
    elsewhere can reach us by giving its own name our address. A WebSocket is opened only from the
    page that we served. Anybody may ask for ``/health``. ``scope`` is that of an ASGI request.
    """
    headers = {name.lower(): value.decode("latin-1") for name, value in scope.get("headers", ())}
    host, origin = headers.get(b"host", ""), headers.get(b"origin")
    try:
        asked, page = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
    except ValueError:
        return "the request's headers are malformed"
    if token is None and not is_loopback(asked or ""):
        return "this view answers to this machine only"
    if scope["type"] == "websocket" and origin is not None and page != host:
        return "a page from elsewhere cannot connect"
    if token is None or scope.get("path") == "/health":
        return None
    if any(hmac.compare_digest(offer.encode(), token.encode()) for offer in _offers(scope, headers, token)):
        return None
    return "the token is missing or wrong: use the address that was printed when the view started"


def _offers(scope: Dict[str, Any], headers: Dict[bytes, str], token: str) -> Iterable[str]:
    yield from parse_qs(scope.get("query_string", b"").decode("latin-1")).get("token", [])
    bearer = headers.get(b"authorization", "")
    if bearer.startswith("Bearer "):
        yield bearer[len("Bearer ") :]
    try:
        cookie = SimpleCookie(headers.get(b"cookie", "")).get(cookie_name(token))
    except CookieError:
        cookie = None
    if cookie is not None:
        yield cookie.value
