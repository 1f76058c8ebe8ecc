"""Faults injected into what the runtime reads: frames, boxes, manifests, export directories."""

from __future__ import annotations

import copy
import errno
import json
import multiprocessing
import os
import shutil
from pathlib import Path
from typing import Any, List

import numpy as np
import pytest
from hypothesis import HealthCheck, given, settings
from hypothesis import strategies as st

from asymtrack_edge.errors import AsymTrackError, BoxError, ExportError, FrameError, ManifestError
from asymtrack_edge.geometry import check_box, clip_box, crop_window
from asymtrack_edge.manifest import FORMAT, load_manifest
from asymtrack_edge.runtime import MultiTracker, Tracker, open_reader, open_source
from tests.runtime.simulated import ColourBackend, coloured_patches, moving_square, write_video

scalars = st.one_of(st.none(), st.booleans(), st.integers(), st.floats(), st.text(max_size=8))
anything = scalars | st.lists(st.integers(), max_size=3)


@settings(max_examples=1000, deadline=None)
@given(st.one_of(st.lists(st.floats(), min_size=4, max_size=4), st.lists(anything, max_size=6), anything))
def test_any_box_is_refused_or_can_be_followed(box: Any) -> None:
    try:
        checked = check_box(box, (240, 320, 3))
    except BoxError as error:
        assert str(error)
        return
    try:
        window = crop_window(checked, 4.0)
    except BoxError:
        return
    assert window.side >= 1
    kept = clip_box(checked, (240, 320, 3))
    assert np.isfinite(kept).all() and kept.w >= 10 and kept.h >= 10


FRAMES = [frame for frame, _ in moving_square(6, (200, 160))]
BAD_FRAMES: List[Any] = [
    None,
    "frame",
    np.zeros((0, 0, 3), np.uint8),
    np.zeros((1, 500, 3), np.uint8),
    np.zeros((50, 50), np.uint8),
    np.zeros((50, 50, 4), np.uint8),
    np.zeros((50, 50, 3), np.float32),
    np.zeros((50, 50, 3), np.uint16),
]


def test_unusable_frames_between_good_ones_change_nothing(model: Path) -> None:
    clean, disturbed = Tracker.load(model, threads=1), Tracker.load(model, threads=1)
    for tracker in (clean, disturbed):
        tracker.init(FRAMES[0], (60, 50, 32, 32))
    for i, frame in enumerate(FRAMES[1:]):
        for bad in BAD_FRAMES[i::2]:
            with pytest.raises(FrameError):
                disturbed.update(bad)
        assert disturbed.update(frame) == clean.update(frame)


def test_frames_of_any_size_layout_and_lifetime(model: Path) -> None:
    """Resized between updates, views with gaps, read-only memory, a single column of pixels."""
    tracker = Tracker.load(model, threads=1)
    tracker.init(FRAMES[0], (60, 50, 32, 32))
    big = np.random.RandomState(0).randint(0, 256, (700, 900, 3)).astype(np.uint8)
    locked = big[:300, :400].copy()
    locked.flags.writeable = False
    sizes = [big, big[::2, ::3], big[:, ::-1], big[..., ::-1], locked, big[:2, :2], big[:700, :2], big]
    for frame in sizes:
        track = tracker.update(frame)
        height, width = frame.shape[:2]
        assert np.isfinite(track.box).all() and track.box.w >= 10
        assert track.box.x < width and track.box.y < height


def test_video_truncated_anywhere_ends_early_but_well(tmp_path: Path) -> None:
    write_video(tmp_path / "whole.avi", 20)
    data = (tmp_path / "whole.avi").read_bytes()
    for share in (0, 1, 10, 30, 50, 70, 90, 99):
        path = tmp_path / f"{share}.avi"
        path.write_bytes(data[: len(data) * share // 100])
        try:
            with open_reader(open_source(str(path))) as reader:
                frames = [frame.image for frame in reader]
        except AsymTrackError as error:
            assert share < 30, f"{share} %: {error}"
            continue
        assert len(frames) <= 20
        assert all(frame is None or frame.shape == (240, 320, 3) for frame in frames)


def test_sources_leave_no_descriptors_or_threads_behind(tmp_path: Path) -> None:
    import threading

    write_video(tmp_path / "v.avi", 6)
    before = (0, 0)
    for i in range(40):
        with open_reader(open_source(str(tmp_path / "v.avi"))) as reader:
            next(reader)
        if i == 5:
            before = len(os.listdir("/proc/self/fd")), threading.active_count()
    # Fewer if something of an earlier test was given back meanwhile.
    assert len(os.listdir("/proc/self/fd")) <= before[0] and threading.active_count() <= before[1]


def test_export_directory_may_change_while_it_is_in_use(batch_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(batch_model, folder)
    clean, used = Tracker.load(batch_model, threads=1), Tracker.load(folder, threads=1)
    for tracker in (clean, used):
        tracker.init(FRAMES[0], (60, 50, 32, 32))
    (folder / "search.onnx").write_bytes(b"something else")
    assert used.update(FRAMES[1]) == clean.update(FRAMES[1])
    shutil.rmtree(folder)
    used.init(FRAMES[1], (60, 50, 32, 32))
    assert used.update(FRAMES[2]).box is not None
    with pytest.raises(ManifestError):
        Tracker.load(folder)


def test_altered_file_is_not_loaded(batch_model: Path, tmp_path: Path) -> None:
    folder = tmp_path / "export"
    shutil.copytree(batch_model, folder)
    data = bytearray((folder / "search.onnx").read_bytes())
    data[len(data) // 2] ^= 1
    (folder / "search.onnx").write_bytes(data)
    with pytest.raises(ManifestError, match="altered or damaged"):
        Tracker.load(folder)


@settings(max_examples=200, deadline=None, suppress_health_check=[HealthCheck.function_scoped_fixture])
@given(data=st.data())
def test_damaged_manifests_are_refused_with_one_line(data: Any, batch_model: Path, tmp_path: Path) -> None:
    """A value anywhere in a real manifest replaced, removed, or the text cut."""
    text = (batch_model / "manifest.json").read_text()
    content = json.loads(text)
    for key in ("how_to", "provenance", "verification"):
        content.pop(key)
    node: Any = content
    while True:
        keys = sorted(node) if isinstance(node, dict) else list(range(len(node)))
        key = data.draw(st.sampled_from(keys))
        if isinstance(node[key], (dict, list)) and node[key] and data.draw(st.booleans()):
            node = node[key]
            continue
        if data.draw(st.booleans()):
            node[key] = data.draw(anything)
        else:
            del node[key]
        break
    text = json.dumps(content)
    if data.draw(st.booleans()):
        text = text[: data.draw(st.integers(0, len(text)))]
    (tmp_path / "manifest.json").write_text(text)
    for name in ("template.onnx", "search.onnx"):
        if not (tmp_path / name).exists():
            shutil.copy(batch_model / name, tmp_path / name)
    try:
        load_manifest(tmp_path)
    except ManifestError as error:
        assert "\n" not in str(error)


def _export_in_turn(folder: str, mark: int, times: int) -> None:
    from asymtrack_edge.export.directory import replaced_directory

    for _ in range(times):
        with replaced_directory(Path(folder)) as new:
            (new / "manifest.json").write_text(json.dumps({"format": FORMAT, "mark": mark}))
            (new / "search.onnx").write_text(f"{mark}")


def test_two_processes_exporting_to_one_directory(tmp_path: Path) -> None:
    """A reader at any time finds a whole export of the one or the other, or for a moment none."""
    folder = tmp_path / "export"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_export_in_turn, args=(str(folder), mark, 60)) for mark in (1, 2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        try:
            handle = os.open(folder, os.O_RDONLY)
        except FileNotFoundError:
            continue
        try:
            read = []
            for name in ("manifest.json", "search.onnx"):
                with open(os.open(name, os.O_RDONLY, dir_fd=handle)) as file:
                    read.append(file.read())
            assert json.loads(read[0])["mark"] == int(read[1])
        except FileNotFoundError:
            pass  # it was replaced and removed while we held it
        finally:
            os.close(handle)
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_full_disk_leaves_the_old_export(tmp_path: Path) -> None:
    from asymtrack_edge.export.directory import replaced_directory

    folder = tmp_path / "export"
    _export_in_turn(str(folder), 1, 1)
    with pytest.raises(ExportError, match="No space left"), replaced_directory(folder) as new:
        (new / "manifest.json").write_text("2")
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
    assert (folder / "search.onnx").read_text() == "1"
    assert [p.name for p in tmp_path.iterdir()] == ["export"]


@pytest.mark.parametrize("manifest", ['{"manifest_version": 3}', "[]", "no json"])
def test_a_folder_of_others_is_not_replaced(tmp_path: Path, manifest: str) -> None:
    """Web pages and browser extensions have a manifest.json too."""
    from asymtrack_edge.export.directory import replaced_directory

    (tmp_path / "manifest.json").write_text(manifest)
    (tmp_path / "src.js").write_text("mine")
    with pytest.raises(ExportError, match="is no export directory"), replaced_directory(tmp_path):
        raise AssertionError("nothing may be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "src.js"]


def test_a_file_elsewhere_that_cannot_be_written_is_named(tmp_path: Path) -> None:
    from asymtrack_edge.export.directory import replaced_directory

    elsewhere = tmp_path / "none" / "timing.cache"
    with pytest.raises(ExportError, match=r"none/timing\.cache: No such file"), replaced_directory(tmp_path / "export"):
        elsewhere.write_bytes(b"")


def test_targets_survive_frames_of_changing_format() -> None:
    many = MultiTracker(ColourBackend())
    frames = list(coloured_patches(6, 2))
    ids = [many.add(frames[0][0], box) for box in frames[0][1]]
    before = copy.copy(many.ids)
    for bad in BAD_FRAMES:
        with pytest.raises(FrameError):
            many.update(bad)
    assert many.ids == before == ids
    assert list(many.update(frames[1][0])) == ids
