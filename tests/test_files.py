"""Outputs do not damage existing files, links or streams; inputs may have any name."""

from __future__ import annotations

import os
import signal
import stat
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from contextlib import ExitStack
from pathlib import Path
from typing import Any, List
from unittest.mock import Mock

import cv2
import numpy as np
import pytest

from asymtrack_edge import files
from asymtrack_edge.errors import DatasetError, SourceError, UsageError
from asymtrack_edge.files import OutputFile, list_files, open_video, opencv_path, read_image, read_lines, write_text
from tests.runtime.simulated import write_video

LATIN = os.fsdecode(b"caf\xe9")


def names(folder: Path) -> List[str]:
    return sorted(os.listdir(folder))


def test_plain_file_is_replaced_when_complete_and_keeps_its_mode(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_text("earlier")
    path.chmod(0o640)
    with OutputFile(path) as file:
        file.write(b"one\n")
        file.check_growth()
        assert path.read_text() == "earlier"
        assert file.place == tmp_path / f".o.{os.getpid()}.part.csv" and file.place.read_text() == "one\n"
    assert path.read_text() == "one\n" and stat.S_IMODE(path.stat().st_mode) == 0o640
    assert names(tmp_path) == ["o.csv"]
    files.write_bytes(tmp_path / "a", b"x")
    (tmp_path / "b").touch()
    assert (tmp_path / "a").stat().st_mode == (tmp_path / "b").stat().st_mode


@pytest.mark.parametrize("earlier", [True, False])
def test_a_failure_keeps_the_earlier_file_and_leaves_no_other(tmp_path: Path, earlier: bool) -> None:
    path = tmp_path / "o.csv"
    if earlier:
        path.write_text("earlier")
    with pytest.raises(KeyError), OutputFile(path) as file:
        file.write(b"half")
        raise KeyError
    assert [(p.name, p.read_text()) for p in tmp_path.iterdir()] == [("o.csv", "earlier")] * earlier


def test_links_stay_links(tmp_path: Path) -> None:
    (tmp_path / "target").write_text("a longer text of earlier")
    (tmp_path / "soft").symlink_to("target")
    (tmp_path / "dangling").symlink_to("there")
    os.link(tmp_path / "target", tmp_path / "hard")
    for name in ("soft", "dangling"):
        OutputFile(tmp_path / name).discard()
    assert (tmp_path / "target").read_text() == "a longer text of earlier"
    assert names(tmp_path) == ["dangling", "hard", "soft", "target"]
    for name, place in (("soft", "target"), ("hard", "target"), ("dangling", "there")):
        write_text(tmp_path / name, name)
        assert (tmp_path / place).read_text() == name
    assert (tmp_path / "soft").is_symlink() and (tmp_path / "dangling").is_symlink()
    assert (tmp_path / "hard").stat().st_nlink == 2


@pytest.mark.skipif(os.geteuid() != 0, reason="only root may write another user's file of mode 600")
def test_another_users_file_keeps_owner_and_mode(tmp_path: Path) -> None:
    path = tmp_path / "o.csv"
    path.write_text("earlier and longer")
    path.chmod(0o600)
    os.chown(path, 1234, 4321)
    write_text(path, "new")
    found = path.stat()
    assert (found.st_uid, found.st_gid, stat.S_IMODE(found.st_mode), found.st_size) == (1234, 4321, 0o600, 3)


def test_a_mounted_file_is_written_into(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    """In a container, renaming onto a mounted file fails with 'device or resource busy'."""
    path = tmp_path / "o.csv"
    path.write_text("earlier and longer")
    before = path.stat()
    monkeypatch.setattr(files.os, "replace", Mock(side_effect=OSError(16, os.strerror(16))))
    write_text(path, "new")
    assert path.stat().st_ino == before.st_ino and path.read_text() == "new" and names(tmp_path) == ["o.csv"]
    monkeypatch.setattr(files.os, "lstat", lambda _: os.stat_result((*before[:2], before.st_dev + 1, *before[3:])))
    with OutputFile(path) as file:
        file.write(b"row\n")
        assert path.read_text() == "row\n"


def test_standard_output_is_not_reopened(capfd: Any, monkeypatch: Any) -> None:
    """Reopening would overwrite a redirected output from its start, and the file may belong to another user."""
    monkeypatch.setattr(os, "access", lambda path, *_: "stdout" not in str(path))
    os.write(1, b"before\n")
    write_text("/dev/stdout", "rows\n")
    os.write(1, b"after\n")
    assert capfd.readouterr().out == "before\nrows\nafter\n"


def test_names_may_have_the_greatest_length(tmp_path: Path) -> None:
    for name in ("x" * 251 + ".csv", "é" * 125 + ".csv", LATIN + ".csv", "a:b%02d.csv"):
        write_text(tmp_path / name, "x")
        assert names(tmp_path) == [name]
        (tmp_path / name).unlink()


@pytest.mark.parametrize("where", ["folder", "no/such/o.csv", "file/o.csv", "lost", "x" * 256])
def test_impossible_outputs_are_refused_in_one_line(tmp_path: Path, where: str) -> None:
    (tmp_path / "folder").mkdir()
    (tmp_path / "file").touch()
    (tmp_path / "lost").symlink_to("no/folder/x")
    for attempt in (files.check_output, OutputFile):
        with pytest.raises(UsageError) as caught:
            attempt(tmp_path / where)
        assert "\n" not in str(caught.value)
    assert names(tmp_path) == ["file", "folder", "lost"]


def test_an_unfinished_file_of_an_earlier_process_with_the_same_id_is_kept(tmp_path: Path) -> None:
    path, rescued = tmp_path / "o.csv", tmp_path / f".o.{os.getpid()}.part.csv"
    rescued.write_text("rows of a run that was killed")
    with OutputFile(path) as first, OutputFile(path) as second:
        first.write(b"first")
        second.write(b"second")
    assert rescued.read_text() == "rows of a run that was killed" and path.read_text() == "first"
    assert names(tmp_path) == [rescued.name, path.name]


@pytest.mark.parametrize("name", ["10:30/a", "10:30:22", LATIN, f"{LATIN}/a", "50%02d", "é"])
def test_videos_of_any_name_open(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, name: str) -> None:
    write_video(tmp_path / "v.avi", 3)
    name += ".avi"
    path = tmp_path / name
    path.parent.mkdir(exist_ok=True)
    (tmp_path / "v.avi").rename(path)
    monkeypatch.chdir(tmp_path)
    before = len(os.listdir("/proc/self/fd"))
    capture = open_video(name)
    assert [capture.read()[0] for _ in range(4)] == [True, True, True, False]
    capture.release()
    assert len(os.listdir("/proc/self/fd")) == before
    assert not open_video("no " + name).isOpened()
    # If v%d.avi is not a video, OpenCV would open v0.avi, v1.avi ... as images.
    for i in range(3):
        (tmp_path / f"v{i}.avi").write_bytes(cv2.imencode(".png", np.zeros((8, 8, 3), np.uint8))[1].tobytes())
    (tmp_path / "v%d.avi").write_bytes(b"no video")
    assert not open_video("v%d.avi").isOpened()


def test_opencv_path(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(tmp_path)
    assert opencv_path("10:30.mp4") == f"{tmp_path}/10:30.mp4"
    # A UTF-8 name as Python decodes it in an ASCII locale.
    assert opencv_path(os.fsencode("/клип.mp4").decode("utf-8", "surrogateescape")) == "/клип.mp4"
    with pytest.raises(SourceError, match=r"caf\\xe9\.mp4, which is not UTF-8: rename it"):
        opencv_path(LATIN + ".mp4")


@pytest.mark.parametrize("name", [LATIN + ".png", "a%d:b.png"])
def test_images_of_any_name(tmp_path: Path, name: str) -> None:
    image = np.random.RandomState(0).randint(0, 256, (9, 7, 3)).astype(np.uint8)
    files.write_image(tmp_path / name, image)
    assert np.array_equal(read_image(tmp_path / name), image)
    (tmp_path / "bad.png").write_bytes((tmp_path / name).read_bytes()[:40])
    (tmp_path / "empty.png").touch()
    assert [read_image(tmp_path / bad) for bad in ("bad.png", "empty.png", "none.png", ".")] == [None] * 4
    with pytest.raises(UsageError, match="no such image format"):
        files.write_image(tmp_path / "a.xyz", image)


def test_lists_of_any_editor(tmp_path: Path) -> None:
    path = tmp_path / "list.txt"
    for data in (
        "one\nseq two\né\n".encode(),
        "one\r\n\r\n seq two\t\r\né\r\n".encode("utf-8-sig"),
        "one\rseq two\ré".encode("utf-16"),
        b"\xfe\xff" + "one\nseq two\né".encode("utf-16-be"),
    ):
        path.write_bytes(data)
        assert read_lines(path) == ["one", "seq two", "é"]
    for data in (b"caf\xe9\n", b"\xff\xfea", "one".encode("utf-16-le"), bytes(range(256))):
        path.write_bytes(data)
        with pytest.raises(DatasetError, match=r"list\.txt"):
            read_lines(path)
    with pytest.raises(DatasetError, match=r"none\.txt"):
        read_lines(tmp_path / "none.txt")


def test_files_of_a_folder(tmp_path: Path) -> None:
    for name in ("10.jpg", "2.JPG", "01.jpg", "1.jpg", "._1.jpg", ".hidden.jpg", "notes.txt", LATIN + ".jpg"):
        (tmp_path / name).touch()
    (tmp_path / "folder.jpg").mkdir()
    os.mkfifo(tmp_path / "3.jpg")
    # A dangling link stands for a file that was not fetched; reading it reports it as missing.
    (tmp_path / "11.jpg").symlink_to("not-fetched")
    (tmp_path / "12.jpg").symlink_to("12.jpg")
    expected = ["01.jpg", "1.jpg", "2.JPG", "10.jpg", "11.jpg", "12.jpg", LATIN + ".jpg"]
    assert [p.name for p in list_files(tmp_path, (".jpg",))] == expected


@pytest.mark.parametrize("silent_writer", [False, True])
def test_waiting_for_a_silent_fifo_ends_at_a_signal(tmp_path: Path, silent_writer: bool) -> None:
    os.mkfifo(tmp_path / "v.ts")
    held = os.open(tmp_path / "v.ts", os.O_RDWR) if silent_writer else os.open(os.devnull, os.O_RDWR)
    # A test run in the background of a script ignores the signal; its children must not.
    code = "import signal; signal.signal(signal.SIGINT, signal.default_int_handler)"
    code += "; from asymtrack_edge.files import open_video"
    command = [sys.executable, "-c", f"{code}; print(1, flush=True); open_video({str(tmp_path / 'v.ts')!r})"]
    with subprocess.Popen(command, stdout=subprocess.PIPE, stderr=subprocess.DEVNULL) as process:
        assert process.stdout is not None and process.stdout.readline() == b"1\n"
        time.sleep(0.5)  # by then it waits for data
        process.send_signal(signal.SIGINT)
        try:
            assert process.wait(10) == -signal.SIGINT
        finally:
            process.kill()
            os.close(held)


def test_a_locked_folder_is_reported_and_waited_for(tmp_path: Path, caplog: Any) -> None:
    with ExitStack() as first, ThreadPoolExecutor(1) as second:
        first.enter_context(files.locked(tmp_path))
        waiting = second.submit(lambda: [files.locked(tmp_path).__enter__()])
        while not caplog.messages:
            time.sleep(0.01)
        assert f"another process is working in {tmp_path}" in caplog.messages[0] and not waiting.done()
        first.close()
        waiting.result(10)
