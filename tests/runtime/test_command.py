"""asymtrack-track from its command line, with a stand-in for the networks."""

from __future__ import annotations

import csv
import errno
import json
import os
import signal
import socket
import threading
from pathlib import Path
from types import SimpleNamespace
from typing import Any, Dict, List

import cv2
import numpy as np
import pytest

from asymtrack_edge.files import OutputFile
from asymtrack_edge.geometry import iou
from asymtrack_edge.runtime.outputs import Result
from asymtrack_edge.runtime.outputs.pictures import VideoWriter
from asymtrack_edge.runtime.sources.reader import Captured
from tests.runtime import fake_command
from tests.runtime.simulated import as_argument, coloured_patches, count_frames, write_video


@pytest.fixture()
def video(tmp_path: Path) -> Path:
    write_video(tmp_path / "in.avi")
    return tmp_path / "in.avi"


TRUTH = [boxes for _, boxes in coloured_patches(40, 3)]


def rows(path: Path) -> List[Dict[str, str]]:
    with open(path, newline="") as file:
        return list(csv.DictReader(file))


def box_of(row: Dict[str, str]) -> List[float]:
    return [float(row[name]) for name in "xywh"]


def test_one_target_to_all_outputs(video: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    out, strip = tmp_path / "out.mp4", tmp_path / "strip.png"
    arguments = [str(video), "--box", as_argument(TRUTH[0][0]), "--output", str(out), "--strip", str(strip)]
    assert fake_command.main([*arguments, "--boxes", str(tmp_path / "b.csv"), "--json"]) == 0
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == 40 and summary["unreadable"] == 0 and summary["lost"] == 0
    written = rows(tmp_path / "b.csv")
    assert (tmp_path / "b.csv").read_text().startswith("frame,x,y,w,h,score,state\n")
    assert [int(row["frame"]) for row in written] == list(range(40))
    assert all(iou(box_of(row), truth[0]) > 0.7 for row, truth in zip(written, TRUTH))
    assert count_frames(out) == 40
    assert cv2.imread(str(strip)).shape == (240, 6 * 320, 3)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["b.csv", "in.avi", "out.mp4", "strip.png"]


def test_several_targets_have_a_last_column(video: Path, tmp_path: Path) -> None:
    boxes = [argument for box in TRUTH[0] for argument in ("--box", as_argument(box))]
    assert fake_command.main([str(video), *boxes, "--boxes", str(tmp_path / "b.csv")]) == 0
    written = rows(tmp_path / "b.csv")
    assert list(written[0]) == ["frame", "x", "y", "w", "h", "score", "state", "target"]
    assert len(written) == 120
    for row in written:
        truth = TRUTH[int(row["frame"])][int(row["target"])]
        assert iou(box_of(row), truth) > 0.7


def test_json_lines_on_stdout_are_only_that(video: Path, capfd: pytest.CaptureFixture[str]) -> None:
    assert fake_command.main([str(video), "--box", as_argument(TRUTH[0][0]), "--send", "-"]) == 0
    captured = capfd.readouterr()
    lines = [json.loads(line) for line in captured.out.splitlines()]
    assert [line["frame"] for line in lines] == list(range(40))
    assert lines[5]["size"] == [320, 240] and lines[5]["age_ms"] >= 0
    target = lines[5]["targets"][0]
    assert target["id"] == 0 and target["state"] == "tracking" and iou(target["box"], TRUTH[5][0]) > 0.7
    assert all(b["time"] >= a["time"] > 1e9 for a, b in zip(lines, lines[1:]))
    assert "40 frames at" in captured.err


def test_udp_messages_arrive(video: Path) -> None:
    with socket.socket(socket.AF_INET, socket.SOCK_DGRAM) as receiver:
        receiver.bind(("127.0.0.1", 0))
        receiver.settimeout(5)
        where = f"udp://127.0.0.1:{receiver.getsockname()[1]}"
        assert fake_command.main([str(video), "--box", as_argument(TRUTH[0][0]), "--send", where]) == 0
        frames = [json.loads(receiver.recv(65536))["frame"] for _ in range(40)]
    assert frames == list(range(40))


def test_udp_without_anybody_there_does_not_stop_the_run(video: Path, tmp_path: Path) -> None:
    arguments = ["--box", as_argument(TRUTH[0][0]), "--boxes", str(tmp_path / "b.csv")]
    assert fake_command.main([str(video), *arguments, "--send", "udp://127.0.0.1:9"]) == 0
    assert len(rows(tmp_path / "b.csv")) == 40


def test_times_of_the_source_in_messages_and_csv(video: Path, tmp_path: Path) -> None:
    arguments = ["--box", as_argument(TRUTH[0][0]), "--boxes", str(tmp_path / "b.csv"), "--pts"]
    assert fake_command.main([str(video), *arguments, "--send", str(tmp_path / "o.jsonl")]) == 0
    lines = (tmp_path / "o.jsonl").read_text().splitlines()
    expected = pytest.approx([i / 25 for i in range(40)])
    assert [json.loads(line)["pts"] for line in lines] == expected
    assert list(rows(tmp_path / "b.csv")[0])[-2:] == ["state", "pts"]
    assert [float(row["pts"]) for row in rows(tmp_path / "b.csv")] == expected


@pytest.mark.parametrize("fps", [105.613, 66.667, 119.88, 29.97, 999.99, 0.5])
def test_any_frame_rate_can_be_written(tmp_path: Path, fps: float) -> None:
    """MPEG-4's time base has 16 bits."""
    writer = VideoWriter(tmp_path / "o.mp4", fps, (48, 64, 3))
    writer.write(Result(Captured(np.zeros((48, 64, 3), np.uint8), 0, 0.0, 0.0), {}, 0.0))
    writer.close()
    capture = cv2.VideoCapture(str(tmp_path / "o.mp4"))
    assert capture.read()[0]
    assert capture.get(cv2.CAP_PROP_FPS) == pytest.approx(30 if fps < 1 else fps, rel=5e-4)


def test_a_video_that_cannot_be_encoded_leaves_earlier_files(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    (tmp_path / "b.csv").write_text("earlier")
    monkeypatch.setattr(cv2, "VideoWriter", lambda *_: SimpleNamespace(isOpened=lambda: False))
    monkeypatch.setattr(cv2, "VideoWriter_fourcc", lambda *_: 0, raising=False)
    arguments = ["--boxes", str(tmp_path / "b.csv"), "--output", str(tmp_path / "o.mp4")]
    assert fake_command.main([str(video), "--box", as_argument(TRUTH[0][0]), *arguments]) == 2
    assert "no mp4v encoder" in capsys.readouterr().err
    assert {p.name for p in tmp_path.iterdir()} == {"in.avi", "b.csv"} and (tmp_path / "b.csv").read_text() == "earlier"


def test_the_source_is_not_written_over(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert fake_command.main([str(video), "--box", "5,5,9,9", "--output", str(video)]) == 2
    assert "is the source itself" in capsys.readouterr().err and count_frames(video) == 40


def test_one_file_is_not_two_outputs(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    same = str(video.with_name("same.jsonl"))
    assert fake_command.main([str(video), "--box", "5,5,9,9", "--boxes", same, "--send", same]) == 2
    assert "give each its own" in capsys.readouterr().err and not os.path.exists(same)


def test_nothing_is_said_of_the_speed_of_no_update(video: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (video.parent / "one").mkdir()
    cv2.imwrite(str(video.parent / "one" / "1.png"), next(coloured_patches(1))[0])
    assert fake_command.main([str(video.parent / "one"), "--box", as_argument(TRUTH[0][0])]) == 0
    out = capsys.readouterr().out
    assert "1 frames at" in out and "update alone" not in out


def test_frame_limit_and_unreadable_frames(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    folder = tmp_path / "frames"
    folder.mkdir()
    for i, (frame, _) in enumerate(coloured_patches(12, 1)):
        cv2.imwrite(str(folder / f"{i}.png"), frame)
    box = as_argument(next(coloured_patches(1, 1))[1][0])
    (folder / "4.png").write_bytes(b"")
    (folder / "6.png").write_bytes((folder / "5.png").read_bytes()[:99])
    arguments = [str(folder), "--box", box, "--boxes", str(tmp_path / "b.csv"), "--max-frames", "10"]
    assert fake_command.main([*arguments, "--json"]) == 1, "frames of the folder were not read"
    summary = json.loads(capsys.readouterr().out)
    assert summary["frames"] == 10 and summary["unreadable"] == 2
    assert [int(row["frame"]) for row in rows(tmp_path / "b.csv")] == [0, 1, 2, 3, 5, 7, 8, 9]


def test_a_first_frame_that_cannot_be_read_is_one_line(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "0.png").write_bytes(b"no picture")
    cv2.imwrite(str(tmp_path / "1.png"), next(coloured_patches(1))[0])
    assert fake_command.main([str(tmp_path), "--box", "5,5,9,9", "--boxes", str(tmp_path / "b.csv")]) == 2
    assert "the first frame of" in capsys.readouterr().err and not (tmp_path / "b.csv").exists()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "mark a target"),
        (["--box", "1,2,3"], "--box takes x,y,w,h"),
        (["--box", "1,2,3,4", "--select"], "exclude each other"),
        (["--box", "900,900,5,5"], "outside the frame"),
        (["--box", "5,5,9,9", "--max-frames", "1"], "--max-frames"),
        (["--box", "5,5,9,9", "--send", "tcp://x"], "--send takes"),
        (["--box", "5,5,9,9", "--send", "udp://x"], "needs a host and a port"),
        (["--box", "5,5,9,9", "--boxes", "/no/such/folder/b.csv"], "there is no folder"),
        (["--box", "5,5,9,9", "--output", "x.gif"], ".mp4, .avi or .mkv"),
        (["--box", "5,5,9,9", "--web", "99999"], "--web takes a port"),
        (["--box", "5,5,9,9", "--patience", "-1"], "--patience"),
        (["--box", "5,5,9,9", "--pts"], "--pts is a column of --boxes"),
        (["--box", "5,5,9,9", "--show"], "--show needs a display"),
        (["--select"], "--select needs a display"),
    ],
)
def test_mistakes_are_one_line(
    arguments: List[str],
    message: str,
    video: Path,
    capsys: pytest.CaptureFixture[str],
    monkeypatch: pytest.MonkeyPatch,
) -> None:
    monkeypatch.setenv("DISPLAY", ":77")  # which nobody serves
    assert fake_command.main([str(video), *arguments]) == 2
    captured = capsys.readouterr()
    assert message in captured.err and captured.err.count("\n") == 1 and not captured.out


def test_failed_output_is_completed_and_the_others_go_on(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    """The disk fills up: the csv holds whole rows, the video all frames."""

    def full(descriptor: int, data: memoryview) -> int:
        if bytes(data[:3]) == b"20,":
            return real(descriptor, data[:7])  # the beginning of a row still fits
        if len(data) < 40:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        return real(descriptor, data)

    real = os.write
    monkeypatch.setattr(os, "write", full)
    out = tmp_path / "out.mp4"
    arguments = ["--box", as_argument(TRUTH[0][0]), "--boxes", str(tmp_path / "b.csv"), "--output", str(out)]
    assert fake_command.main([str(video), *arguments]) == 2
    assert "No space left" in capsys.readouterr().err
    assert [int(row["frame"]) for row in rows(tmp_path / "b.csv")] == list(range(20))
    assert (tmp_path / "b.csv").read_text().endswith("\n")
    assert count_frames(out) == 40


@pytest.mark.parametrize("wrong", [["--output", "out.mov"], ["--strip", "/no/such/folder/s.png"]])
def test_a_run_that_does_not_start_leaves_earlier_files_alone(video: Path, tmp_path: Path, wrong: List[str]) -> None:
    earlier = {"b.csv": "earlier rows", "o.jsonl": "earlier lines"}
    for name, text in earlier.items():
        (tmp_path / name).write_text(text)
    arguments = ["--box", as_argument(TRUTH[0][0]), "--boxes", str(tmp_path / "b.csv")]
    arguments += ["--send", str(tmp_path / "o.jsonl"), *wrong]
    if "--strip" in wrong:
        arguments += ["--output", str(tmp_path / "o.mp4")]
    assert fake_command.main([str(video), *arguments]) == 2
    assert {p.name: p.read_text() for p in tmp_path.iterdir() if p.name in earlier} == earlier
    assert not [p for p in tmp_path.iterdir() if "part" in p.name or p.suffix == ".mp4"]


def test_a_signal_while_the_outputs_are_completed_does_not_cut_that_short(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    """The source ends by itself; Ctrl-C and SIGTERM come just when the first output is completed."""
    if threading.current_thread() is not threading.main_thread():
        pytest.skip("handlers belong to the main thread: a signal would end the test run")

    def slow_close(self: Any) -> None:
        for number in (signal.SIGINT, signal.SIGTERM):
            os.kill(os.getpid(), number)
        close(self)

    close = OutputFile.close
    monkeypatch.setattr(OutputFile, "close", slow_close)
    arguments = ["--box", as_argument(TRUTH[0][0]), "--boxes", str(tmp_path / "b.csv")]
    arguments += ["--send", str(tmp_path / "o.jsonl")]
    before = signal.getsignal(signal.SIGINT)
    assert fake_command.main([str(video), *arguments]) == 0
    assert signal.getsignal(signal.SIGINT) is before
    assert len(rows(tmp_path / "b.csv")) == 40 == len((tmp_path / "o.jsonl").read_text().splitlines())


def test_run_ends_when_nothing_can_be_written_any_more(
    video: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch, capsys: pytest.CaptureFixture[str]
) -> None:
    monkeypatch.setenv("FAKE_FREE", "1000")
    out = tmp_path / "out.mp4"
    assert fake_command.main([str(video), "--box", as_argument(TRUTH[0][0]), "--output", str(out)]) == 2
    captured = capsys.readouterr()
    assert "the disk is almost full" in captured.err and "Traceback" not in captured.err
    assert not out.exists()
