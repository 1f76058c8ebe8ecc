"""Output files stay readable, however a run ends."""

from __future__ import annotations

import csv
import json
import os
import signal
import subprocess
import sys
from pathlib import Path
from time import sleep
from typing import Any

import pytest

from tests.runtime.simulated import as_argument, coloured_patches, count_frames, write_video

ROOT = Path(__file__).parents[2]


@pytest.fixture(scope="module")
def video(tmp_path_factory: pytest.TempPathFactory) -> Path:
    path = tmp_path_factory.mktemp("long") / "in.avi"
    write_video(path, 1500, 1)
    return path


BOX = as_argument(next(coloured_patches(1, 1))[1][0])


def _default_signals() -> None:
    """Restores default handling: tests under nohup or in a script's background ignore signals, children must not."""
    for number in (signal.SIGINT, signal.SIGHUP):
        signal.signal(number, signal.SIG_DFL)


def start(video: Path, folder: Path, *more: str) -> subprocess.Popen[str]:
    command = [sys.executable, "-m", "tests.runtime.fake_command", str(video), "--box", BOX, *more]
    for option, name in (("--output", "o.mp4"), ("--boxes", "o.csv"), ("--send", "o.jsonl")):
        command += [option, str(folder / name)]
    pipes: Any = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE, "text": True}
    environment = {**os.environ, "FAKE_PAUSE": "0.005"}
    process = subprocess.Popen(command, cwd=ROOT, env=environment, preexec_fn=_default_signals, **pipes)
    part = folder / f".o.{process.pid}.part.csv"
    for _ in range(600):
        if part.exists() and part.read_text().count("\n") > 20:
            return process
        sleep(0.05)
    process.kill()
    raise AssertionError(f"the run did not start: {process.communicate()}")


def check_whole(folder: Path, csv_name: str = "o.csv", lines_name: str = "o.jsonl") -> int:
    rows = list(csv.reader((folder / csv_name).read_text().splitlines()))
    assert rows[0] == ["frame", "x", "y", "w", "h", "score", "state"]
    assert all(len(row) == 7 for row in rows)
    frames = [int(row[0]) for row in rows[1:]]
    assert frames == list(range(len(frames))) and len(frames) >= 20
    lines = (folder / lines_name).read_text().splitlines()
    assert [json.loads(line)["frame"] for line in lines] in (frames, frames[:-1])
    return len(frames)


@pytest.mark.parametrize(
    ("number", "times"), [(signal.SIGTERM, 1), (signal.SIGHUP, 1), (signal.SIGINT, 1), (signal.SIGINT, 6)]
)
def test_signals_leave_valid_files(video: Path, tmp_path: Path, number: signal.Signals, times: int) -> None:
    """If a signal is repeated, a late one may end the process after its files are complete."""
    process = start(video, tmp_path, "--json")
    for _ in range(times):
        process.send_signal(number)
        sleep(0.01)
    out, err = process.communicate(timeout=30)
    assert process.returncode == 128 + number or times > 1, err
    assert "interrupted: completing the files" in err and "Traceback" not in err
    frames = check_whole(tmp_path)
    assert count_frames(tmp_path / "o.mp4") in (frames, frames - 1)
    assert times > 1 or json.loads(out)["frames"] in (frames, frames + 1)
    assert not [p for p in tmp_path.iterdir() if ".part" in p.name]


def test_a_signal_before_the_first_frame_leaves_nothing(video: Path, tmp_path: Path) -> None:
    """Nothing reads the FIFO, so opening it blocks."""
    os.mkfifo(tmp_path / "pipe.jsonl")
    ended = run("$TRACK --boxes $OUT/o.csv --send $OUT/pipe.jsonl & sleep 3; kill -TERM $!; wait $!", video, tmp_path)
    assert ended.returncode == 143 and "interrupted" in ended.stderr and "Traceback" not in ended.stderr
    assert [p.name for p in tmp_path.iterdir()] == ["pipe.jsonl"]


def test_kill_loses_no_row(video: Path, tmp_path: Path) -> None:
    """After SIGKILL or a power failure, the unfinished files have complete rows."""
    process = start(video, tmp_path)
    process.kill()
    process.communicate(timeout=30)
    check_whole(tmp_path, f".o.{process.pid}.part.csv", f".o.{process.pid}.part.jsonl")


def run(shell: str, video: Path, folder: Path) -> subprocess.CompletedProcess[str]:
    """Runs a shell line, in which ``$TRACK`` is the command with its source and box."""
    track = f"{sys.executable} -m tests.runtime.fake_command {video} --box {BOX} --max-frames 100"
    environment = {**os.environ, "TRACK": track, "OUT": str(folder)}
    return subprocess.run(["bash", "-c", shell], cwd=ROOT, env=environment, capture_output=True, text=True, timeout=60)


@pytest.mark.parametrize(
    "shell",
    [
        "$TRACK --send - --boxes $OUT/o.csv | head -n 1 >/dev/null; exit ${PIPESTATUS[0]}",
        "$TRACK --boxes $OUT/o.csv >&-",
        "$TRACK --boxes $OUT/o.csv 2>&-",
        "$TRACK --boxes $OUT/o.csv 2> >(true)",
        "$TRACK --boxes $OUT/o.csv <&- >&- 2>&-",
        "$TRACK --boxes $OUT/o.csv --send - >&-",
        "$TRACK --boxes /dev/stdout > $OUT/o.csv",
        "$TRACK --boxes $OUT/o.csv --json $OUT/o.json > /dev/full; test $? = 2 -a -s $OUT/o.json",
        "$TRACK --boxes $OUT/o.csv --pts 2> /dev/full",
        "$TRACK --boxes >(cat > $OUT/o.csv); wait $!",
        "head -n 1 $OUT/pipe.jsonl >/dev/null & $TRACK --boxes $OUT/o.csv --send $OUT/pipe.jsonl",
        # A video exceeds the system's limit on file size, which the encoder does not report.
        "(ulimit -f 4; $TRACK --output $OUT/o.mp4); test $? = 2 -a ! -e $OUT/o.mp4 && $TRACK --boxes $OUT/o.csv",
    ],
)
def test_closed_streams_do_not_end_a_run(video: Path, tmp_path: Path, shell: str) -> None:
    os.mkfifo(tmp_path / "pipe.jsonl")
    ended = run(shell, video, tmp_path)
    assert ended.returncode == 0 and "Traceback" not in ended.stderr, ended.stderr
    lines = (tmp_path / "o.csv").read_text().splitlines()
    assert len(lines) == 101 and lines[-1].startswith("99,")


def test_a_run_whose_only_reader_ends_also_ends_quietly(video: Path, tmp_path: Path) -> None:
    ended = run("$TRACK --send - | head -n 2; exit ${PIPESTATUS[0]}", video, tmp_path)
    assert ended.returncode == 0 and ended.stdout.count("\n") == 2 and "Traceback" not in ended.stderr
