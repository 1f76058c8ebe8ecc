"""Every kind of source: real decoders, a real HTTP server, and a stand-in for GStreamer."""

from __future__ import annotations

import http.server
import os
import re
import subprocess
import sys
import threading
from contextlib import suppress
from itertools import cycle
from pathlib import Path
from time import monotonic, sleep
from typing import Any, Dict, Iterator, List
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from asymtrack_edge.errors import SourceError, UsageError, without_secrets
from asymtrack_edge.files import system_text
from asymtrack_edge.runtime import sources
from asymtrack_edge.runtime.sources import open_source, videos
from asymtrack_edge.runtime.sources.cameras import Pipeline
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from asymtrack_edge.runtime.sources.reader import Reader

HERE = Path(__file__).parent
PROBED: Dict[str, Any] = {}  # path -> Authorization header of the request that asks for the length
PICTURES = [cv2.imencode(".jpg", frame)[1].tobytes() for frame, _ in synthetic_clip(8, (320, 240))]
PICTURES.insert(4, b"\xff\xd8\xff\xd9")  # a damaged one, which is no reason to reconnect


class Handler(http.server.BaseHTTPRequestHandler):
    """``/live`` is an endless camera, ``/unsized`` nine pictures; so is ``/sized``, whose connection breaks halfway."""

    def do_GET(self) -> None:
        asked, data = self.headers.get("Range", ""), b"".join(PICTURES)
        if "0-0" in asked:
            PROBED[self.path] = self.headers.get("Authorization")
        first, size = int(asked[6:].partition("-")[0] or 0), len(data)
        headers: Dict[str, Dict[str, object]] = {
            "/moved": {"Location": "/sized"},
            "/sized": {"Content-Length": size - first, "Content-Range": f"bytes {first}-{size - 1}/{size}"},
            # Some cameras state a length, too.
            "/live": {"Content-Length": 10**9, "Content-Type": "multipart/x-mixed-replace; boundary=frame"},
        }
        self.send_response({"/moved": 302, "/sized": 206}.get(self.path, 200))
        for name, value in headers.get(self.path, {}).items():
            self.send_header(name, str(value))
        self.end_headers()
        if self.path != "/live":
            self.wfile.write(data[first : None if first or self.path == "/unsized" else size // 2])
            return
        with suppress(OSError):
            for data in cycle(PICTURES):
                head = f"--frame\r\nContent-Type: image/jpeg\r\nContent-Length: {len(data)}\r\n\r\n"
                self.wfile.write(head.encode() + data + b"\r\n")
                sleep(0.02)

    log_message = Mock()


@pytest.fixture(scope="module")
def server() -> Iterator[str]:
    serving = http.server.ThreadingHTTPServer(("127.0.0.1", 0), Handler)
    threading.Thread(target=serving.serve_forever, daemon=True).start()
    yield f"http://127.0.0.1:{serving.server_address[1]}"
    serving.shutdown()
    serving.server_close()


def test_http_stream(server: str) -> None:
    with Reader(open_source(f"{server}/live"), patience=10) as reader:
        assert reader.source.live
        assert all(next(reader).image.shape == (240, 320, 3) for _ in range(12)) and not reader.reconnects


def test_recordings_over_http_have_an_end(server: str) -> None:
    """Recordings of raw JPEG pictures, whose number OpenCV does not know."""
    with Reader(open_source(f"{server}/sized")) as reader:
        assert not reader.source.live and reader.source.length is None
        unreadable = [sleep(0.01) or frame.number for frame in reader if frame.image is None]
        assert (unreadable, reader.received) == ([4], 9), "frames of a recording must not be dropped"
    open_source(server.replace("//", "//m%65:s%40cret@") + "/moved").close()
    assert PROBED["/moved"] == "Basic bWU6c0BjcmV0" and not PROBED["/sized"], "a password must not follow a redirect"
    lines: List[str] = []
    # Without a length it is played twice: only the repetition shows that it is not live.
    with Reader(open_source(f"{server}/unsized"), report=lines.append) as reader:
        assert reader.source.live and list(reader)
        assert reader.received == 16
    assert any("a recording, which ends here" in line for line in lines)


def test_servers_that_fall_silent_for_ten_seconds(monkeypatch: pytest.MonkeyPatch) -> None:
    """A playlist's next file takes as long; other servers have stopped, and OpenCV returns frames that it has kept."""
    good = True, np.zeros((9, 9, 3))
    reads = [good, good] + 1000 * [(False, None)]
    capture = Mock(**{"get.return_value": 0, "retrieve.return_value": good, "read.side_effect": reads})
    monkeypatch.setattr(cv2, "VideoCapture", Mock(return_value=capture))
    monkeypatch.setattr(videos, "monotonic", lambda: 10 * (capture.grab.call_count + (capture.read.call_count > 0)))
    assert open_source("http://127.0.0.1:9/live.M3U8?id=1").read() and not open_source("http://127.0.0.1:9/live").read()
    assert [call.args[2][3] for call in cv2.VideoCapture.call_args_list] == [20_000, 5_000]
    recording = videos.Video(capture, "http://127.0.0.1:9/live.webm")
    assert len(list(recording)) == 2 and recording.damaged


#: Writes its process id to a file, and a header and a picture to the given descriptor; then it stays silent.
SCRIPT = """#!/bin/sh
echo $$ > "{pid}"
echo a word of a driver
for last; do :; done
exec > /proc/self/fd/${{last#fd=}}
{header}
exec sleep 60
"""
HEADER = "printf 'YUV4MPEG2 W8 H2 F30:1\\nFRAME\\n123456789012345678901234'"


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "bin" / "gst-launch-1.0"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(pid=tmp_path / "pid", header=HEADER))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return script


def gone(folder: Path) -> bool:
    """Whether the process has ended; waits up to two seconds for it."""
    stat = Path("/proc", (folder / "pid").read_text().strip(), "stat")
    for _ in range(100):
        if system_text(stat).split()[2:3] in ([], ["Z"]):
            return True
        sleep(0.02)
    return False


def test_a_pipeline_is_read_and_started_again_when_it_ends(launcher: Path, tmp_path: Path) -> None:
    red = HEADER[:-25] + r"\121" * 16 + r"\132" * 4 + r"\360" * 4 + "'; exit"
    launcher.write_text(SCRIPT.format(pid=tmp_path / "pid", header=red))
    with Reader(open_source("videotestsrc ! appsink")) as reader:
        assert reader.source.live and reader.source.fps == 30
        blue, green, red = next(reader).image.reshape(-1, 3).mean(0)
        assert red > 240 and blue < 15 and green < 15
        while reader.reconnects < 2:
            next(reader)


def test_a_pipeline_gives_pictures_until_it_is_released(launcher: Path, tmp_path: Path) -> None:
    pipeline = Pipeline("videotestsrc")
    assert pipeline.grab() and pipeline.retrieve()[1].shape == (2, 8, 3)
    pipeline.release()
    pipeline.release()
    assert gone(tmp_path)
    # Another file may now have the number of its descriptor.
    with open(launcher, "rb", 0) as one, open(launcher, "rb", 0) as two:
        assert not pipeline.grab() and one.tell() == two.tell() == 0


@pytest.mark.parametrize("width", [2, 4, 6, 12])
def test_padded_rows_of_old_gstreamer_are_read(launcher: Path, tmp_path: Path, width: int) -> None:
    planes = [np.random.default_rng(i).integers(9, 99, (4, width // part), np.uint8) for i, part in ((0, 1), (1, 2))]
    shown = []
    for padding in (False, True):
        rows = [np.pad(plane, ((0, 0), (0, -plane.shape[1] % 4 * padding))).tobytes() for plane in planes]
        frames = b"".join(b"FRAME\n" + b"".join(rows) for _ in range(3))
        (tmp_path / "y4m").write_bytes(b"YUV4MPEG2 W%d H4 F30:1\n" % width + frames)
        launcher.write_text(SCRIPT.format(pid=tmp_path / "pid", header=f"cat {tmp_path}/y4m"))
        pipeline = Pipeline("videotestsrc")
        shown.append([pipeline.retrieve()[1].tolist() for _ in range(3) if pipeline.grab()])
        pipeline.release()
    assert shown[0] == shown[1] and len(shown[0]) == 3


@pytest.mark.skipif(os.system("gst-inspect-1.0 --exists vp9dec 2>&-") != 0, reason="GStreamer's VP9 is not installed")
def test_padded_pictures_of_a_decoder_are_read() -> None:
    pipeline = Pipeline("videotestsrc num-buffers=3 ! video/x-raw,format=I420,width=642 ! vp9enc deadline=1 ! vp9dec")
    assert [pipeline.grab() for _ in range(4)] == [True, True, True, False]
    pipeline.release()


def test_a_program_that_does_not_release_its_pipeline_leaves_no_process(launcher: Path, tmp_path: Path) -> None:
    code = "from asymtrack_edge.runtime.sources.cameras import Pipeline; kept = Pipeline('videotestsrc')"
    subprocess.run([sys.executable, "-c", code], cwd=HERE.parents[1], check=True, timeout=30)
    assert gone(tmp_path)


def test_one_line_says_why_a_pipeline_does_not_start(launcher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.write_text("#!/bin/sh\necho no element $2 $3 >&2\n")
    with pytest.raises(SourceError, match=r"no element nosuchsrc user-pw=\*\*\*$"):
        Pipeline("nosuchsrc user-pw='secret'")
    launcher.write_text(SCRIPT.format(pid=launcher.parent / "pid", header=HEADER.replace("W8", "W5")))
    with pytest.raises(SourceError, match="pictures of 5x2"):
        Pipeline("videotestsrc")


def test_cameras_get_their_options(monkeypatch: pytest.MonkeyPatch) -> None:
    capture = Mock(**{"get.return_value": 30})
    monkeypatch.setattr(cv2, "VideoCapture", lambda *_: capture)
    assert open_source("7?fps=60&width=640&height=480&format=MJPG").fps == 30
    # The format comes first: it determines the available sizes and rates.
    assert [call.args[1] for call in capture.set.call_args_list] == [cv2.VideoWriter_fourcc(*"MJPG"), 640, 480, 60]
    refuse = Mock(side_effect=SourceError("no camera"))
    monkeypatch.setattr(sources, "Pipeline", refuse)
    with pytest.raises(SourceError):
        open_source("csi://1?width=1920&height=1080&fps=60&flip=2")
    assert re.search(r"nvarguscamerasrc sensor-id=1 .*width=1920,height=1080,framerate=60/1", refuse.call_args[0][0])
    assert refuse.call_args[0][0].endswith("flip-method=2 ! video/x-raw,format=I420")
    for bad in ("7?fps", "7?width=9", "csi://0?wdth=3", "csi://0?fps=fast", "csi://x", "csi://0?fps=30 ! fakesink"):
        with pytest.raises((UsageError, SourceError)):
            open_source(bad)
    refuse.assert_called_once()


@pytest.mark.parametrize(
    ("source", "message"),
    [
        ("no/such/file.mp4", "there is no file"),
        (str(HERE.parents[1] / "constraints.txt"), "not a video"),  # FFmpeg would render the text
        ("97", "cannot open camera 97"),
        ("/dev/v4l/by-id/none?fps=30", "cannot open camera /dev/v4l/by-id/none"),
        ("HTTP://127.0.0.1:1/x", "cannot open http"),  # FFmpeg knows schemes in lower case only
        ("rtsp://u:secret@127.0.0.1:9/x", r"cannot open rtsp://127.0.0.1:9/\*\*\*:"),
        ("rtsp://u:my' secret@127.0.0.1:9/x", "cannot open"),
        ("http://u:secret@[::1/x", "cannot open"),
        ("videotestsrc ! fakesink", r"gstreamer1\.0-tools"),
    ],
)
def test_missing_sources_are_reported_soon(source: str, message: str, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv("PATH", "/nowhere")
    began = monotonic()
    with pytest.raises(SourceError, match=message) as caught:
        open_source(source)
    assert monotonic() - began < 8 and "secret" not in str(caught.value)


@pytest.mark.parametrize(
    ("url", "shown"),
    [
        ("rtsp://me:p@ss:word@host/x", "rtsp://host/***"),
        ("rtsp://me:pa/ss@host/x", "rtsp://***"),
        ("rtsp://me:12/34@host:554/x", "rtsp://***"),
        ("rtsp://10.0.0.2:554/user=admin_password=secret_channel=1.sdp", "rtsp://10.0.0.2:554/***"),
        ("http://[fe80::1]:80/video.cgi?user=admin&pwd=secret", "http://[fe80::1]:80/***"),
        ("srt://host:9?passphrase=secret", "srt://host:9/***"),
        ("rtsps://token@host", "rtsps://host/***"),
        ("udp://239.0.0.1:1234", "udp://239.0.0.1:1234"),
        ('could not open "rtsp://a:b@host/c" or http://d/e?f', 'could not open "rtsp://host/***" or http://d/***'),
        ("there is no file rtsp:/u:secret@h/x", "there is no file rtsp:/h/***"),
        ("rtsp://h/***: is it up?", "rtsp://h/***: is it up?"),
    ],
)
def test_secrets_are_not_shown(url: str, shown: str) -> None:
    assert without_secrets(url) == shown
