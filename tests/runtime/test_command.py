"""``asymtrack-track`` from its command line, with a stand-in for the networks."""

from __future__ import annotations

import csv
import errno
import json
import os
import shutil
import signal
import socket
import tracemalloc
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from asymtrack_edge.files import OutputFile
from asymtrack_edge.geometry import iou
from asymtrack_edge.runtime.outputs import Result
from asymtrack_edge.runtime.outputs.pictures import StripWriter, VideoWriter, Window
from asymtrack_edge.runtime.outputs.rows import RowWriter
from asymtrack_edge.runtime.sources.reader import Captured
from tests.datasets.miniature import write_images
from tests.runtime import fake_command
from tests.runtime.simulated import as_argument, coloured_patches, count_frames, write_video

TRUTH = [boxes for _, boxes in coloured_patches(40, 3)]
Printed = pytest.CaptureFixture[str]


@pytest.fixture()
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "in.avi")
    return tmp_path / "in.avi"


def track(source: Path, *arguments: object) -> int:
    return fake_command.main([str(source), "--box", as_argument(TRUTH[0][0]), *map(str, arguments)])


def rows(path: Path) -> List[Dict[str, str]]:
    return list(csv.DictReader(path.read_text().splitlines()))


def box_of(row: Dict[str, str]) -> List[float]:
    return [float(row[name]) for name in "xywh"]


def test_one_target_to_all_files(video: Path, tmp_path: Path, capsys: Printed) -> None:
    out, strip, boxes, lines = (tmp_path / name for name in ("out.mp4", "strip.png", "b.csv", "o.jsonl"))
    outputs = ("--output", out, "--strip", strip, "--boxes", boxes, "--pts", "--send", lines, "--json")
    assert track(video, *outputs) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == 40 and summary["unreadable"] == 0 and summary["lost"] == 0
    written, messages = rows(boxes), [json.loads(line) for line in lines.read_text().splitlines()]
    assert list(written[0]) == ["frame", "x", "y", "w", "h", "score", "state", "pts"]
    assert [int(row["frame"]) for row in written] == [message["frame"] for message in messages] == list(range(40))
    assert all(iou(box_of(row), truth[0]) > 0.7 for row, truth in zip(written, TRUTH))
    times = pytest.approx([i / 25 for i in range(40)])
    assert [float(row["pts"]) for row in written] == times == [message["pts"] for message in messages]
    assert count_frames(out) == 40
    assert cv2.imread(str(strip)).shape == (240, 6 * 320, 3)
    assert sorted(os.listdir(tmp_path)) == ["b.csv", "in.avi", "o.jsonl", "out.mp4", "strip.png"]


def test_two_targets_as_messages_on_stdout_and_by_udp(video: Path, tmp_path: Path, capfd: Printed) -> None:
    """Only messages are on stdout; an address without a receiver does not stop the run; the CSV has a target column."""
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        where = f"udp://127.0.0.1:{receiver.getsockname()[1]}"
        outputs = ("--boxes", tmp_path / "b.csv", "--send", "-", "--send", where, "--send", "udp://127.0.0.1:9")
        assert track(video, "--box", as_argument(TRUTH[0][2]), *outputs) == 0
        sent = [json.loads(receiver.recv(65536)) for _ in range(40)]
    captured = capfd.readouterr()
    assert [json.loads(line) for line in captured.out.splitlines()] == sent
    assert "40 frames at" in captured.err
    assert [message["frame"] for message in sent] == list(range(40))
    assert sent[5]["size"] == [320, 240] and sent[5]["age_ms"] >= 0
    for target, truth in zip(sent[5]["targets"], (TRUTH[5][0], TRUTH[5][2])):
        assert target["state"] == "tracking" and iou(target["box"], truth) > 0.7
    written = rows(tmp_path / "b.csv")
    assert list(written[0])[-2:] == ["state", "target"] and [row["target"] for row in written] == ["0", "1"] * 40
    assert all(b["time"] >= a["time"] > 1e9 for a, b in zip(sent, sent[1:]))
    for name in ("-", "/dev/stdout"):
        assert track(video, "--boxes", name, "--send", "-") == 2 and "both stdout" in capfd.readouterr().err
    assert track(video, "--boxes", "-") == 0
    assert capfd.readouterr().out.count("\n") == 41


@pytest.mark.parametrize("fps", [105.613, 66.667, 29.97, 999.99, 0.5, 0])
def test_any_frame_rate_and_a_disk_that_fills(tmp_path: Path, fps: float, monkeypatch: pytest.MonkeyPatch) -> None:
    """MPEG-4's time base has only 16 bits."""
    writer = VideoWriter(tmp_path / "o.mp4", fps, (48, 64, 3))
    for shape in ((48, 64, 3), (30, 50, 3)):  # pictures of another size are resized
        writer.write(result := Result(Captured(np.zeros(shape, np.uint8), 0, 0.0, 0.0), {}, 0.0))
    writer.close()
    late = VideoWriter(tmp_path / "o.mp4", fps, (48, 64, 3))
    monkeypatch.setattr("asymtrack_edge.runtime.outputs.pictures.LEAST_FREE", 1 << 62)  # the disk has filled since
    with pytest.raises(OSError, match="almost full"):
        late.write(result)
    late.close()  # without a frame it replaces nothing
    capture = cv2.VideoCapture(str(tmp_path / "o.mp4"))
    assert [capture.read()[0] for _ in range(3)] == [True, True, False]
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(fps or 30, rel=5e-4)


def test_limits_of_the_strip_and_the_window(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """A strip is never wider than a JPEG can be; the key q and closing the window end the run."""
    strip, window, ended = StripWriter(tmp_path / "s.jpg", 1), Window(), []
    seen = [0.0, 1.0, 1.0, -1.0]  # not on the screen yet, open, open, closed
    for name, effect in (("imshow", None), ("waitKey", [-1, ord("q"), -1, -1]), ("getWindowProperty", seen)):
        monkeypatch.setattr(cv2, name, Mock(side_effect=effect))
    for i in range(4):
        for sink in (strip, window):
            sink.write(Result(Captured(np.zeros((4, 40_000, 3), np.uint8), i, 0.0, 0.0), {}, 0.0))
        ended.append(window.wants_end)
    strip.close()
    assert ended == [False, True, False, True] and cv2.imread(str(tmp_path / "s.jpg")).shape[1] < 65_500


def test_frame_limit_and_unreadable_frames(tmp_path: Path, capsys: Printed) -> None:
    folder = tmp_path / "frames"
    write_images(folder, (frame for frame, _ in coloured_patches(12, 3)))
    for name in ("4.png", "._1.png", "notes.txt"):
        (folder / name).write_bytes(b"")
    (folder / "6.png").write_bytes((folder / "5.png").read_bytes()[:99])
    assert track(folder, "--boxes", tmp_path / "b.csv", "--max-frames", 10, "--json") == 1, "unreadable frames: code 1"
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == 10 and summary["unreadable"] == 2
    written = rows(tmp_path / "b.csv")
    assert [int(row["frame"]) for row in written] == [0, 1, 2, 3, 5, 7, 8, 9]
    assert all(iou(box_of(row), TRUTH[int(row["frame"])][0]) > 0.7 for row in written)
    (folder / "0.png").write_bytes(b"no picture")
    assert track(folder, "--boxes", tmp_path / "none.csv") == 2
    assert "the first frame of" in capsys.readouterr().err and not (tmp_path / "none.csv").exists()


BOX = ["--box", "5,5,9,9"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mark a target"),
        (["--box", "1,2,3,4", "--select"], "exclude each other"),
        (["--box", "900,900,5,5"], "outside the frame"),
        ([*BOX, "--max-frames", "0"], "--max-frames"),
        ([*BOX, "--boxes", "b.json"], "use --send FILE.jsonl"),
        ([*BOX, "--send", "tcp://x"], "--send takes"),
        ([*BOX, "--send", "udp://x"], "needs a host and a port"),
        ([*BOX, "--json", "same.jsonl", "--send", "same.jsonl"], "give each its own"),
        ([*BOX, "--output", "in.avi"], "is the source itself"),
        ([*BOX, "--web", "99999"], "--web takes a port"),
        ([*BOX, "--patience", "-1"], "--patience"),
        ([*BOX, "--pts"], "--pts needs --boxes"),
        ([*BOX, "--host", "0.0.0.0"], "--host needs --web PORT"),
        ([*BOX, "--show"], "--show needs a display"),
        (["--select"], "--select needs a display"),
    ],
)
def test_mistakes_are_one_line(arguments: List[str], message: str, video: Path, capsys: Any, monkeypatch: Any) -> None:
    monkeypatch.chdir(video.parent)
    monkeypatch.setenv("DISPLAY", ":77")  # a display that does not exist
    Path("cv2.py").write_text("open('executed', 'w')")  # a stranger's file
    assert fake_command.main(["in.avi", *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out
    assert count_frames(video) == 40 and sorted(os.listdir(".")) == ["cv2.py", "in.avi"]


def test_a_failed_output_is_completed_and_the_others_continue(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    """The disk fills up: the CSV has complete rows, the video all frames."""

    def full(descriptor: int, data: memoryview) -> int:
        if bytes(data[:3]) == b"20,":
            return real(descriptor, data[:7])  # the beginning of a row still fits
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    real = os.write
    monkeypatch.setattr(os, "write", full)
    assert track(video, "--boxes", tmp_path / "b.csv", "--output", tmp_path / "out.mp4") == 2
    assert "No space left" in capsys.readouterr().err
    assert [int(row["frame"]) for row in rows(tmp_path / "b.csv")] == list(range(20))
    assert (tmp_path / "b.csv").read_text().endswith("\n")
    assert count_frames(tmp_path / "out.mp4") == 40

    gone = Mock(side_effect=OSError(errno.EROFS, os.strerror(errno.EROFS)))
    monkeypatch.setattr(os, "write", gone)
    assert track(video, "--boxes", tmp_path / "b.csv") == 2
    assert "nothing was written" in capsys.readouterr().err and len(rows(tmp_path / "b.csv")) == 20
    for module, name, what in ((os, "write", real), (os, "replace", gone), (shutil, "copyfile", gone)):
        monkeypatch.setattr(module, name, what)
    assert track(video, "--boxes", tmp_path / "c.csv") == 2
    summary, said = capsys.readouterr()
    assert "c.csv cannot be completed: Read-only" in said and f"/.c.{os.getpid()}.part.csv\n" in said
    assert summary.startswith("40 frames at")


@pytest.mark.parametrize(
    ("wrong", "message"),
    [
        ("--output out.mov", ".mp4, .avi or .mkv"),
        ("--output o.mp4 --strip /no/such/folder/s.png", "there is no folder"),
        ("--output encoder.mp4", "no mp4v encoder"),
        ("--output full.mp4", "the disk is almost full"),
    ],
)
def test_a_run_that_does_not_start_leaves_earlier_files_alone(
    video: Path, wrong: str, message: str, monkeypatch: pytest.MonkeyPatch, capsys: Printed
) -> None:
    monkeypatch.chdir(video.parent)
    earlier = {"b.csv": "earlier rows", "o.jsonl": "earlier lines"}
    for name, text in earlier.items():
        Path(name).write_text(text)
    if "encoder" in wrong:
        monkeypatch.setattr(cv2, "VideoWriter", lambda *_: SimpleNamespace(isOpened=lambda: False))
        monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: 0, raising=False)
    if "full" in wrong:
        monkeypatch.setattr(shutil, "disk_usage", lambda path: SimpleNamespace(total=1 << 40, free=1000))
    assert track(video, "--boxes", "b.csv", "--send", "o.jsonl", *wrong.split()) == 2
    assert message in capsys.readouterr().err
    assert {name: Path(name).read_text() for name in os.listdir(".") if name != "in.avi"} == earlier


def test_signals_do_not_interrupt_the_completion_of_outputs(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source ends by itself; SIGINT and SIGTERM arrive while the first output is completed."""

    def slow_close(self: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        close(self)

    close = OutputFile.close
    monkeypatch.setattr(OutputFile, "close", slow_close)
    before = signal.getsignal(signal.SIGINT)
    assert track(video, "--boxes", tmp_path / "b.csv", "--send", tmp_path / "o.jsonl") == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert len(rows(tmp_path / "b.csv")) == 40 == len((tmp_path / "o.jsonl").read_text().splitlines())


def test_frames_are_not_kept(video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a run of days, references to old frames (230 KB each here) would fill the memory."""
    memory: List[int] = []
    monkeypatch.setattr(RowWriter, "write", lambda *_: memory.append(tracemalloc.get_traced_memory()[0]))
    tracemalloc.start()
    try:
        assert track(video, "--boxes", tmp_path / "b.csv", "--output", tmp_path / "out.avi") == 0
    finally:
        tracemalloc.stop()
    assert max(memory[-10:]) < max(memory[5:15]) + 1_000_000
