"""What browsers may say, and who may say anything; needs no web framework."""

from __future__ import annotations

import json
import struct
from typing import Any, Dict, Optional

import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymtrack_edge.errors import UsageError
from asymtrack_edge.runtime.web.protocol import Wish, cookie_name, is_loopback, pack_picture, parse_wish, refusal

numbers = st.one_of(st.integers(), st.floats(), st.booleans(), st.none(), st.text(max_size=5))
junk = st.recursive(
    numbers,
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
messages = st.fixed_dictionaries(
    {"action": st.sampled_from(["ack", "hold", "mark", "remove", "pause", "step", "end", "x", 3])},
    optional={"frame": junk, "box": st.lists(numbers, min_size=3, max_size=5) | junk, "target": junk},
)


@settings(max_examples=500, deadline=None)
@given(st.one_of(st.text(max_size=300), junk.map(json.dumps), messages.map(json.dumps)))
def test_any_text_is_a_sound_wish_or_a_usage_error(text: str) -> None:
    try:
        wish = parse_wish(text)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert isinstance(wish, Wish)
    if wish.action == "mark":
        assert wish.box is not None and wish.frame is not None
        assert wish.box[2] > 0 and wish.box[3] > 0 and all(abs(v) < 1e9 for v in wish.box)
    if wish.action == "remove":
        assert type(wish.target) is int and wish.target >= 0


@pytest.mark.parametrize("text", ["[" * 99999, '{"action":' * 5000, "NaN", "1e999", '{"action": "mark"}', ""])
def test_texts_meant_to_hurt(text: str) -> None:
    with pytest.raises(UsageError):
        parse_wish(text)


def test_messages_and_pictures_are_what_the_page_takes_them_for() -> None:
    wish = parse_wish('{"action": "mark", "frame": 17, "box": [1, 2.5, 3, 4], "target": 2}')
    assert wish == Wish("mark", 17, (1.0, 2.5, 3.0, 4.0), 2)
    packet = pack_picture({"frame": 3}, b"JPEG")
    (length,) = struct.unpack(">I", packet[:4])
    assert json.loads(packet[4 : 4 + length]) == {"frame": 3} and packet[4 + length :] == b"JPEG"


def scope(kind: str = "http", path: str = "/", query: str = "", **headers: str) -> Dict[str, Any]:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return {"type": kind, "path": path, "query_string": query.encode(), "headers": pairs}


@pytest.mark.parametrize(
    ("request_", "token", "allowed"),
    [
        (scope(host="127.0.0.1:8080"), None, True),
        (scope(host="localhost:8080"), None, True),
        (scope(host="[::1]:8080"), None, True),
        (scope(host="evil.example:8080"), None, False),
        (scope(), None, False),
        (scope("websocket", host="localhost:8080", origin="http://localhost:8080"), None, True),
        (scope("websocket", host="localhost:8080", origin="http://evil.example"), None, False),
        (scope(host="10.0.0.5:8080"), "secret", False),
        (scope(host="10.0.0.5:8080", query="token=wrong"), "secret", False),
        (scope(host="10.0.0.5:8080", query="token=secret"), "secret", True),
        (scope(host="10.0.0.5:8080", cookie="a=b; " + cookie_name("secret") + "=secret"), "secret", True),
        (scope(host="10.0.0.5:8080", cookie=cookie_name("secret") + "=secre"), "secret", False),
        # Another view of the same host has its own cookie, which must not take this one's place.
        (scope(host="10.0.0.5:8080", cookie=cookie_name("other") + "=secret"), "secret", False),
        (scope(host="["), None, False),
        (scope("websocket", host="localhost:8080", origin="http://["), None, False),
        (scope("websocket", host="10.0.0.5:8080", query="token=secret", origin="http://["), "secret", False),
        (scope(host="10.0.0.5:8080", authorization="Bearer secret"), "secret", True),
        (scope(host="10.0.0.5:8080", authorization="secret"), "secret", False),
        (scope("websocket", host="10.0.0.5:8080"), "secret", False),
        (scope("websocket", host="10.0.0.5:8080", query="token=secret", origin="http://x"), "secret", False),
        (scope(path="/health", host="10.0.0.5:8080"), "secret", True),
        (scope(path="/boxes.csv", host="10.0.0.5:8080"), "secret", False),
    ],
)
def test_who_may_ask(request_: Dict[str, Any], token: Optional[str], allowed: bool) -> None:
    assert (refusal(request_, token) is None) == allowed


@settings(max_examples=500, deadline=None)
@given(st.lists(st.binary(max_size=60), min_size=5, max_size=5))
def test_no_header_gets_in_without_the_token(values) -> None:
    host, cookie, authorization, origin, query = values
    headers = [(b"host", host), (b"cookie", cookie), (b"authorization", authorization), (b"origin", origin)]
    for kind in ("http", "websocket"):
        asked = {"type": kind, "path": "/", "query_string": query, "headers": headers}
        assert refusal(asked, "a token nobody guesses") is not None


def test_loopback() -> None:
    assert all(map(is_loopback, ("127.0.0.1", "127.8.8.8", "::1", "localhost")))
    assert not any(map(is_loopback, ("0.0.0.0", "::", "10.0.0.1", "example.org", "")))
