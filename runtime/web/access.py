"""Who may use the web view: the token, and the rules against other web pages."""

from __future__ import annotations

import hashlib
import hmac
import ipaddress
import os
import re
import secrets
from typing import Optional
from urllib.parse import urlsplit

from starlette.requests import HTTPConnection

from asymtrack_edge.errors import UsageError

SHORTEST_TOKEN = 16  #: in characters


def is_loopback(host: str) -> bool:
    """Whether an address to listen on can be reached from this machine only."""
    try:
        return host == "localhost" or ipaddress.ip_address(host).is_loopback
    except ValueError:
        return False


def cookie_name(token: str) -> str:
    """The name of a view's own cookie: browsers share cookies between the ports of a host."""
    return f"asymtrack_{hashlib.sha256(token.encode()).hexdigest()[:12]}"


def refusal(asking: HTTPConnection, token: Optional[str]) -> Optional[str]:
    """Why a request must not be answered; None if it may.

    Without a token, only requests addressed to this machine itself are answered, so that no other web
    page can reach us by pointing its own host name at our address. A web page can open a WebSocket only
    if we served it. ``/health`` needs no token.
    """
    host, origin = asking.headers.get("host", ""), asking.headers.get("origin")
    try:
        asked, page = urlsplit(f"//{host}").hostname, urlsplit(origin or "").netloc
    except ValueError:
        return "the request's headers are malformed"
    if token is None and not is_loopback(asked or ""):
        return "this view answers requests from this machine only"
    if asking.scope["type"] == "websocket" and origin is not None and page != host:
        return "a page from another site cannot connect"
    if token is None or asking.scope["path"] == "/health":
        return None
    offers = asking.query_params.get("token", ""), asking.cookies.get(cookie_name(token), "")
    if any(hmac.compare_digest(offer.encode(), token.encode()) for offer in offers):
        return None
    return "the token is missing or wrong: use the address that was printed when the view started"


def make_token() -> str:
    """The user's token, so that pages find the view again after a restart, or else a new one."""
    token = os.environ.get("ASYMTRACK_TOKEN") or secrets.token_urlsafe(24)
    if not re.fullmatch(rf"[A-Za-z0-9_-]{{{SHORTEST_TOKEN},}}", token):
        raise UsageError(
            f"ASYMTRACK_TOKEN takes at least {SHORTEST_TOKEN} letters, digits, - or _: "
            "python3 -c 'import secrets; print(secrets.token_urlsafe())' makes one"
        )
    return token
