"""Videos that are damaged, truncated, rotated, or of variable frame rate."""

from __future__ import annotations

import os
import re
import threading
import zlib
from pathlib import Path
from typing import Any, Callable, Tuple

import cv2
import numpy as np
import pytest

from asymtrack_edge.datasets.sequences import Frames, Sequence
from asymtrack_edge.errors import AsymTrackError
from asymtrack_edge.runtime.sources import Source, open_source
from asymtrack_edge.runtime.sources.reader import Reader
from tests.datasets.miniature import write_images
from tests.runtime import fake_command
from tests.runtime.simulated import write_video


def damage(path: Path, *frames: int) -> None:
    """Overwrites the beginning of JPEG pictures in a file."""
    data = bytearray(path.read_bytes())
    starts = [found.start() for found in re.finditer(b"\xff\xd8\xff", data)]
    for number in frames:
        data[starts[number] : starts[number] + 900] = bytes(900)
    path.write_bytes(data)


def read(path: Path) -> Tuple[str, Source]:
    """Which frames of a file are readable, as ``"1101"``, and the source after its end."""
    with open_source(str(path)) as source:
        images = list(source)
    assert all(image is None or image.shape == (240, 320, 3) for image in images)
    return "".join(str(int(image is not None)) for image in images), source


@pytest.mark.parametrize(
    ("damaged", "expected"),
    [([11, 20, 21], ("1" * 11 + "0" + "1" * 8 + "00" + "1" * 8, 0, False)), (range(11, 30), ("1" * 11, 19, True))],
)
def test_only_damaged_frames_of_a_video_are_left_out(tmp_path: Path, damaged: Any, expected: Any, capsys: Any) -> None:
    write_video(tmp_path / "v.avi", 30)
    damage(tmp_path / "v.avi", *damaged)
    readable, source = read(tmp_path / "v.avi")
    assert (readable, source.missing, source.damaged) == expected
    words = [str(tmp_path / "v.avi"), "--box", "100,100,20,20", "--boxes", str(tmp_path / "b.csv")]
    assert fake_command.main(words) == 1 and "varies" not in capsys.readouterr().err


def test_empty_chunks_that_repeat_a_frame_of_an_avi_are_no_damage(tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 20)
    chunks, index = (tmp_path / "v.avi").read_bytes().split(b"idx1")
    chunks = re.sub(rb"(?s)00dc(?=.{4}\xff\xd8)", b"JUNK", chunks, count=5)
    empty = re.sub(rb"(?s)(00dc.{8}).{4}", rb"\1\0\0\0\0", index, count=5)
    (tmp_path / "v.avi").write_bytes(chunks + b"idx1" + empty)
    readable, source = read(tmp_path / "v.avi")
    assert (readable, source.missing, source.damaged) == ("1" * 15, 5, False)


def test_much_sound_between_two_frames_is_no_damage(tmp_path: Path) -> None:
    """An FLV file with 5,000 packets of sound after each frame."""
    block = zlib.compress(bytes(64 * 64 * 3))  # of Screen Video: a whole picture
    frame = b"\x13\x30\x40\x30\x40" + len(block).to_bytes(2, "big") + block
    tags = [(9, frame)] + 5000 * [(8, b"\0\x80")]
    data = [bytes([kind, 0, 0, len(d), *bytes(7)]) + d + (len(d) + 11).to_bytes(4, "big") for kind, d in tags]
    (tmp_path / "v.flv").write_bytes(b"FLV\1\5\0\0\0\x09\0\0\0\0" + 3 * b"".join(data))
    assert [image is not None for image in open_source(str(tmp_path / "v.flv"))] == [True] * 3


def test_sources_leave_no_descriptors_or_threads_behind(tmp_path: Path) -> None:
    write_video(tmp_path / "v.avi", 6)
    held = []
    for _ in range(40):
        with Reader(open_source(str(tmp_path / "v.avi"))) as reader:
            next(reader)
        held.append((len(os.listdir("/proc/self/fd")), threading.active_count()))
    # There may be fewer, if resources of an earlier test were released meanwhile.
    assert held[-1][0] <= held[5][0] and held[-1][1] <= held[5][1]


def edited(data: bytes, path: Any, new: Callable[[bytes], bytes]) -> bytes:
    """An mp4 with the content of the box at ``path`` replaced and all enclosing sizes corrected."""
    out = b""
    while data:
        size, name = int.from_bytes(data[:4], "big"), data[4:8]
        content, data = data[8:size], data[size:]
        if name == path[0]:
            content = edited(content, path[1:], new) if path[1:] else new(content)
        out += (len(content) + 8).to_bytes(4, "big") + name + content
    return out


def moov_first(data: bytes) -> bytes:
    """An mp4 with its index first, so that it can be read although its end is missing."""
    media, moov = data.index(b"free") - 4, data.index(b"moov") - 4

    def moved(table: bytes) -> bytes:
        return table[:8] + (np.frombuffer(table[8:], ">u4") + len(data) - moov).astype(">u4").tobytes()

    table = [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stco"]
    return data[:media] + edited(data[moov:], table, moved) + data[media:moov]


@pytest.mark.parametrize("kind", ["avi", "mp4", "mkv"])
def test_a_truncated_video_ends_early_and_says_so(tmp_path: Path, kind: str) -> None:
    write_video(tmp_path / f"v.{kind}", 20)
    data = (tmp_path / f"v.{kind}").read_bytes()
    if kind == "mp4":
        data = moov_first(data)
    for share in (0, 1, 10, 30, 50, 70, 90, 99, 100):
        path = tmp_path / f"{share}.{kind}"
        path.write_bytes(data[: len(data) * share // 100])
        try:
            readable, source = read(path)
        except AsymTrackError as error:
            assert share < 30, f"{share} %: {error}"
            continue
        assert source.missing == 20 - len(readable) and source.damaged == bool(source.missing)
        assert share == 99 or (readable == "1" * 20) == (share == 100)
        assert share < 50 or len(readable) > 5


@pytest.mark.parametrize(("kind", "low"), [(np.uint16, 7600), (np.int16, -200), (np.float32, 7600)])
def test_images_of_16_bits_become_8_bits(tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: Any, low: int) -> None:
    counts = [low + np.random.RandomState(i).randint(0, 500, (9, 7)).astype(kind) for i in range(3)]
    counts[1][0, 0] = 30_000  # brighter than all of the first image
    if kind is np.float32:
        counts[0][0, 0] = np.inf  # as from a depth camera without an echo
    write_images(tmp_path / "0012", counts, "{}.tiff")
    if cv2.imread(str(tmp_path / "0012" / "0.tiff"), cv2.IMREAD_UNCHANGED).dtype != kind:
        pytest.skip("OpenCV before 4.6 has no signed images: it writes 8 bits and reads values below 0 as above 65,000")
    monkeypatch.chdir(tmp_path)
    evaluated = Sequence("thermal", Frames("0012"), np.ones((3, 4)))
    for i, frame in enumerate(open_source("0012")):
        assert frame is not None and frame.dtype == np.uint8 and frame.std() > 40 and (i != 1 or frame[0, 0, 0] > 250)
        assert np.corrcoef(counts[i].ravel()[1:], frame[..., i].ravel()[1:])[0, 1] > 0.999
        np.testing.assert_array_equal(evaluated.read(i), frame)


@pytest.mark.parametrize(("degrees", "turns"), [(0, 0), (90, 3), (180, 2), (270, 1)])
def test_videos_of_phones_are_upright(tmp_path: Path, degrees: int, turns: int) -> None:
    """The matrix in the track's header rotates the picture clockwise; OpenCV 4.6 and 4.11 get it wrong."""
    write_video(tmp_path / "v.mp4", 3)
    cos, sin = round(np.cos(np.deg2rad(degrees))), round(np.sin(np.deg2rad(degrees)))
    matrix = b"".join((v << 16).to_bytes(4, "big", signed=True) for v in (cos, sin, 0, -sin, cos, 0, 0, 0))
    header = [b"moov", b"trak", b"tkhd"]
    data = edited((tmp_path / "v.mp4").read_bytes(), header, lambda old: old[:40] + matrix + old[72:])
    (tmp_path / "turned.mp4").write_bytes(data)
    plain, upright = (next(iter(open_source(str(tmp_path / name)))) for name in ("v.mp4", "turned.mp4"))
    assert plain is not None and np.array_equal(upright, np.rot90(plain, turns))


def test_media_time_of_a_variable_frame_rate(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    """Four frames of 1/25 second each, then frames that last three times as long."""
    write_video(tmp_path / "v.mp4", 11)

    def varied(table: bytes) -> bytes:
        (delta,) = np.frombuffer(table[12:16], ">u4")
        return table[:4] + np.array([2, 4, delta, 7, 3 * delta], ">u4").tobytes()

    data = edited((tmp_path / "v.mp4").read_bytes(), [b"moov", b"trak", b"mdia", b"minf", b"stbl", b"stts"], varied)
    (tmp_path / "v.mp4").write_bytes(data)
    readable, source = read(tmp_path / "v.mp4")
    # The edit list still ends the video at its old end: frames that it cuts off are missing, but not damaged.
    assert (readable, source.length, source.missing, source.damaged) == ("1" * 7, 11, 4, False)
    (tmp_path / "v.mp4").write_bytes(data.replace(b"edts", b"free"))
    with Reader(open_source(str(tmp_path / "v.mp4"))) as reader:
        times = [frame.pts for frame in reader]
    assert times == pytest.approx([i / 25 for i in range(4)] + [(4 + 3 * i) / 25 for i in range(7)], abs=0.001)
    assert fake_command.main([str(tmp_path / "v.mp4"), "--box", "9,9,20,20", "--output", str(tmp_path / "o.mp4")]) == 0
    assert "o.mp4 plays at a constant 11 fps" in capsys.readouterr().err
