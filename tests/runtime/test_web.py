"""The web view: commands from browsers, access control, and its server over real sockets."""

from __future__ import annotations

import contextlib
import http.client
import json
import select
import socket
import threading
from pathlib import Path
from time import sleep
from typing import Any, Callable, Dict, Iterator, Optional, Tuple
from urllib.parse import urlsplit

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from asymtrack_edge.errors import SourceError, UsageError
from asymtrack_edge.geometry import iou
from asymtrack_edge.runtime import MultiTracker, Reader, open_source
from asymtrack_edge.runtime.run import Run
from asymtrack_edge.runtime.sources import LiveSource
from tests.runtime.simulated import ColourBackend, FakeCapture, coloured_patches, write_video

pytest.importorskip("uvicorn")
websockets = pytest.importorskip("websockets")
connect = pytest.importorskip("websockets.sync.client").connect
HTTPConnection = pytest.importorskip("starlette.requests").HTTPConnection

from asymtrack_edge.runtime.web import access, view  # noqa: E402

TRUTH = [boxes for _, boxes in coloured_patches(400, 3)]
ACTIONS = ("ack", "hold", "mark", "remove", "pause", "step", "end", "fly", 3)
junk = st.recursive(
    st.none() | st.booleans() | st.integers() | st.floats() | st.text(max_size=5),
    lambda inner: st.lists(inner, max_size=5) | st.dictionaries(st.text(max_size=6), inner, max_size=4),
    max_leaves=12,
)
fields = {"action": st.sampled_from(ACTIONS), "frame": junk, "box": junk, "target": junk}
messages = junk | st.fixed_dictionaries({}, optional=fields)


@settings(max_examples=300, deadline=None)
@given(st.text(max_size=300) | st.sampled_from(["[" * 99999, '{"action":' * 5000]) | messages.map(json.dumps))
def test_any_text_is_a_valid_command_or_a_usage_error(text: str) -> None:
    try:
        command = view.parse_command(text)
    except UsageError as error:
        assert "\n" not in str(error)
        return
    assert command.action in ACTIONS[:-2]
    assert (command.box is not None) == (command.action == "mark")
    assert isinstance({"mark": command.frame, "remove": command.target}.get(command.action, 0), int)


def asked(kind: str = "http", path: str = "/", query: str = "", **headers: str) -> Any:
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    return HTTPConnection({"type": kind, "path": path, "query_string": query.encode(), "headers": pairs})


THERE = "10.0.0.5:8080"
COOKIE = access.cookie_name("secret")


@pytest.mark.parametrize(
    ("request_", "token", "allowed"),
    [
        (asked(host="127.0.0.1:8080"), None, True),
        (asked(host="[::1]:8080"), None, True),
        (asked(host="evil.example:8080"), None, False),
        (asked("websocket", host="localhost:8080", origin="http://localhost:8080"), None, True),
        (asked("websocket", host="localhost:8080", origin="http://evil.example"), None, False),
        (asked(host=THERE), "secret", False),
        (asked(host=THERE, query="token=secret"), "secret", True),
        (asked(host=THERE, cookie=f"a=b; {COOKIE}=secret"), "secret", True),
        (asked(host=THERE, cookie=f"{COOKIE}=secre"), "secret", False),
        # Another view on the same host has its own cookie, which must not be accepted here.
        (asked(host=THERE, cookie=access.cookie_name("other") + "=secret"), "secret", False),
        (asked(host="["), None, False),
        (asked("websocket", host="localhost:8080", origin="http://["), None, False),
        (asked("websocket", host=THERE, query="token=secret", origin="http://x"), "secret", False),
        (asked(path="/health", host=THERE), "secret", True),
    ],
)
def test_access_control(request_: Any, token: Optional[str], allowed: bool) -> None:
    assert (access.refusal(request_, token) is None) == allowed


class Running:
    """A run with a web view, in its own thread."""

    def __init__(
        self, source: Any, host: str = "127.0.0.1", pause: float = 0.01, marked: int = 0, port: int = 0
    ) -> None:
        source = open_source(str(source)) if isinstance(source, Path) else source
        self.run = Run(MultiTracker(ColourBackend(pause)), Reader(source))
        self.run.first_frame()
        self.view = view.WebView(self.run, port, host)
        self.run.sinks.append(self.view)
        self.run.start(TRUTH[0][:marked])
        self.run.paused = not marked
        self.thread = threading.Thread(target=self._run)
        self.thread.start()
        self.address = f"127.0.0.1:{urlsplit(self.view.url).port}"

    def _run(self) -> None:
        self.run.follow()
        if not self.run.ended:
            self.run.linger()

    def get(self, path: str, **headers: str) -> Tuple[int, bytes, Dict[str, str]]:
        connection = http.client.HTTPConnection(self.address, timeout=10)
        connection.request("GET", path, headers=headers)
        answer = connection.getresponse()
        return answer.status, answer.read(), dict(answer.getheaders())

    def connect(self, **options: Any) -> Any:
        return connect(f"ws://{self.address}/view", max_size=None, compression=None, **options)

    def close(self) -> None:
        self.run.end()
        self.thread.join(10)
        self.run.close()


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("web") / "in.avi"
    write_video(path, 400)
    return path


@pytest.fixture()
def run(video: Path) -> Iterator[Callable[..., Running]]:
    with contextlib.ExitStack() as opened:
        yield lambda source=video, **options: opened.enter_context(contextlib.closing(Running(source, **options)))


def answer_to(socket: Any, text: str = "", **command: Any) -> Dict[str, Any]:
    """Sends a command or any text and returns the next text message; acknowledges pictures that come before it."""
    socket.send(json.dumps(command) if command else text)
    while True:
        data = socket.recv(timeout=10)
        if isinstance(data, str):
            return json.loads(data)
        socket.send('{"action": "ack"}')


def next_header(socket: Any, least: int = 0) -> Dict[str, Any]:
    """The header of the next picture of frame ``least`` or a later one."""
    while True:
        data = socket.recv(timeout=10)
        if isinstance(data, bytes):
            socket.send('{"action": "ack"}')
            header = json.loads(data[4 : 4 + int.from_bytes(data[:4], "big")])
            if header["frame"] >= least:
                return header


def test_draw_follow_step_remove_download(run: Callable[..., Running]) -> None:
    running = run()
    with running.connect() as socket:
        header = next_header(socket)
        assert header["frame"] == 0 and header["targets"] == [] and header["paused"]
        socket.send(json.dumps({"action": "hold", "frame": 0}))
        assert answer_to(socket, action="mark", frame=0, box=list(TRUTH[0][1]))["target"] == 0
        assert answer_to(socket, action="step")["paused"]
        assert iou(next_header(socket, 1)["targets"][0]["box"], TRUTH[1][1]) > 0.7
        assert answer_to(socket, action="mark", frame=1, box=list(TRUTH[1][0]))["target"] == 1
        assert not answer_to(socket, action="resume")["paused"]
        header = next_header(socket, 30)
        for target, k in zip(header["targets"], (1, 0)):
            assert iou(target["box"], TRUTH[header["frame"]][k]) > 0.7
        assert answer_to(socket, action="remove", target=0)["done"] == "remove"
        assert "no target with id 0" in answer_to(socket, action="remove", target=0)["error"]
        for box, problem in (([1, 1, 0, 5], "no area"), ([9000, 1, 9, 5], "outside")):
            assert problem in answer_to(socket, action="mark", frame=next_header(socket)["frame"], box=box)["error"]
        running.run._limit = 1
        while not next_header(socket)["over"]:
            pass
        assert "the source has ended" in answer_to(socket, action="step")["error"]
    status, body, headers = running.get("/boxes.csv")
    lines = body.decode().splitlines()
    assert status == 200 and "attachment" in headers["content-disposition"]
    assert lines[0] == "frame,x,y,w,h,score,state,target" and len(lines) > 30
    assert all(line.count(",") == 7 for line in lines)


def test_a_box_is_taken_from_the_frame_it_was_drawn_on_or_refused(run: Callable[..., Running]) -> None:
    """The user draws slowly, on a frame that is long past; it is only kept if it was held."""
    running = run(marked=1, pause=0.005)
    with running.connect() as socket:
        start = next_header(socket)["frame"]
        next_header(socket, start + 30)
        refused = answer_to(socket, action="mark", frame=start, box=list(TRUTH[start][2]))
        assert "draw the box again" in refused["error"] and len(running.run.tracker) == 1
        held = next_header(socket)["frame"]
        socket.send(json.dumps({"action": "hold", "frame": held}))
        next_header(socket, held + 60)
        assert answer_to(socket, action="mark", frame=held, box=list(TRUTH[held][2]))["target"] == 1
        colour = running.run.tracker.backend.colours[1]
    assert np.abs(colour - np.array((255, 0, 0))).max() < 70, "the template was cut from another frame"


def test_page_and_its_parts(run: Callable[..., Running]) -> None:
    running = run()
    status, page, headers = running.get("/")
    assert status == 200 and b"<canvas" in page and "default-src 'self'" in headers["content-security-policy"]
    assert b"//" not in page, "the page loads something from another host"
    for path, expected in (("/app.js", 200), ("/style.css", 200), ("/health", 200), ("/../setup.cfg", 404)):
        assert running.get(path)[0] == expected
    assert running.get("/", Host="evil.example")[0] == 403
    with pytest.raises(SourceError, match="cannot serve the web view"):
        view.WebView(running.run, int(running.address.split(":")[1]))


def test_a_token_guards_all_but_health_on_other_addresses(run: Callable[..., Running], monkeypatch: Any) -> None:
    monkeypatch.setenv("ASYMTRACK_TOKEN", "of-my-own-0123456789")
    running = run(host="0.0.0.0")
    assert running.view.url.endswith("?token=of-my-own-0123456789")
    monkeypatch.setenv("ASYMTRACK_TOKEN", "short")
    with pytest.raises(UsageError, match="at least 16"):
        view.WebView(running.run, 0, "0.0.0.0")
    monkeypatch.delenv("ASYMTRACK_TOKEN")
    running = run(host="0.0.0.0")
    token = running.view.token
    assert token is not None and len(token) >= 32 and token in running.view.url
    for path in ("/", "/app.js", "/boxes.csv", "/?token=wrong", "/view"):
        assert running.get(path)[0] == 403, path
    with pytest.raises(websockets.exceptions.InvalidStatus):
        running.connect()
    assert running.get("/health")[0] == 200
    status, _, headers = running.get(f"/?token={token}")
    assert status == 200 and "HttpOnly" in headers["set-cookie"] and "strict" in headers["set-cookie"].lower()
    cookie = headers["set-cookie"].split(";")[0]
    assert running.get("/app.js", Cookie=cookie)[0] == 200
    with running.connect(additional_headers={"Cookie": cookie}) as socket:
        assert next_header(socket)["frame"] == 0


def test_nonsense_is_answered_and_does_no_harm(run: Callable[..., Running]) -> None:
    running = run()
    with running.connect() as socket:
        for text in ("", "{", "[]", '{"action": "fly"}', '{"action": "mark", "frame": 0, "box": "1234"}'):
            assert "error" in answer_to(socket, text)
    # Binary data instead of text, and a message of 100 MB: the connection ends, the server does not.
    for data in (b"\x00\xff", "x" * 100_000_000):
        with pytest.raises((websockets.exceptions.ConnectionClosed, OSError)), running.connect() as socket:
            socket.send(data)
            for _ in range(100):
                socket.recv(timeout=10)
    with running.connect() as socket:
        assert next_header(socket)["frame"] == 0, "the server no longer answers"


def test_silent_connections_are_limited(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "MOST_CONNECTIONS", 3)
    port = urlsplit(run().view.url).port
    silent = [socket.create_connection(("127.0.0.1", port)) for _ in range(6)]
    for connection in silent[3:]:
        connection.settimeout(20)
        assert connection.recv(1) == b"", "it is closed"
    assert not select.select(silent[:3], [], [], 0)[0], "the first three stay open"


def test_a_slow_viewer_gets_few_but_fresh_pictures(run: Callable[..., Running]) -> None:
    running = run(marked=1, pause=0.005)
    with running.connect() as socket:
        next_header(socket)
        while running.run.count < 150:
            sleep(0.02)  # the viewer reads nothing meanwhile
        before = running.run.count
        socket.recv(timeout=10)  # the picture that was already sent
        socket.send('{"action": "ack"}')
        assert next_header(socket)["frame"] >= before - 5


def test_only_the_newest_rows_of_a_run_are_kept(run: Callable[..., Running], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(view, "MOST_ROWS", 20)
    running = run(marked=2, pause=0)
    while running.run.count < 30:
        sleep(0.01)
    frames = [int(line.split(b",")[0]) for line in running.get("/boxes.csv")[1].splitlines()[1:]]
    assert len(frames) == 20 and frames[0] >= 15 and frames == sorted(frames)


def test_a_camera_that_is_silent_is_not_healthy(monkeypatch: pytest.MonkeyPatch, run: Callable[..., Running]) -> None:
    monkeypatch.setattr(view, "SILENCE", 0.2)
    running = run(source=LiveSource("camera", lambda: FakeCapture(100, np.inf, 5, 20.0, (320, 240))), marked=1)
    assert running.get("/health")[0] == 200
    sleep(0.5)
    status, body, _ = running.get("/health")
    assert status == 503 and json.loads(body)["status"] == "no frames"
    running.run.source_ended = True  # no more frames are wanted
    assert running.get("/health")[0] == 200
    running.run.source_ended = False
    with running.connect() as socket:
        assert answer_to(socket, action="end")["done"] == "end"
    running.thread.join(5)
    assert not running.thread.is_alive() and running.run.ended
