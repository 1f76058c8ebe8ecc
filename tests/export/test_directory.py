"""Export directories are replaced atomically, even while others read or write them."""

from __future__ import annotations

import errno
import json
import multiprocessing
import os
import stat
from concurrent.futures import ThreadPoolExecutor, wait
from contextlib import ExitStack, suppress
from pathlib import Path
from typing import Any

import pytest

from asymtrack_edge.errors import ExportError
from asymtrack_edge.export.pipeline import replaced_directory
from asymtrack_edge.files import locked
from asymtrack_edge.manifest import FORMAT


def _export_in_turn(folder: str, mark: int, times: int) -> None:
    for _ in range(times):
        with replaced_directory(Path(folder)) as new:
            (new / "manifest.json").write_text(json.dumps({"format": FORMAT, "mark": mark}))
            (new / "search.onnx").write_text(f"{mark}")


def test_two_processes_exporting_to_one_directory(tmp_path: Path) -> None:
    """At any time a reader finds a complete export of one of them, or for a moment none."""
    folder = tmp_path / "export"
    context = multiprocessing.get_context("spawn")
    workers = [context.Process(target=_export_in_turn, args=(str(folder), mark, 60)) for mark in (1, 2)]
    for worker in workers:
        worker.start()
    while any(worker.is_alive() for worker in workers):
        with suppress(FileNotFoundError), ExitStack() as stack:  # or it was replaced and removed while it is open here
            handle = os.open(folder, os.O_RDONLY)
            stack.callback(os.close, handle)
            read = [Path(f"/proc/self/fd/{handle}", name).read_text() for name in ("manifest.json", "search.onnx")]
            assert json.loads(read[0])["mark"] == int(read[1])
    assert [worker.exitcode for worker in workers] == [0, 0]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export"]


def test_a_directory_is_not_replaced_while_engines_are_built_in_it(tmp_path: Path) -> None:
    """The build would then save the old models' manifest beside the new models."""
    folder = tmp_path / "export"
    _export_in_turn(str(folder), 1, 1)
    with ThreadPoolExecutor(1) as pool, locked(folder):  # as asymtrack-build does
        exporting = pool.submit(_export_in_turn, str(folder), 2, 1)
        assert not wait([exporting], 0.5).done and (folder / "search.onnx").read_text() == "1"
    assert exporting.done() and (folder / "search.onnx").read_text() == "2"


@pytest.mark.parametrize("when", ["full", 0, 1, 2, 3])
def test_a_full_disk_or_a_signal_at_any_moment_leaves_one_export(when: Any, tmp_path: Path, monkeypatch: Any) -> None:
    folder, link, real, done = tmp_path / "export", tmp_path / "link", os.rename, []
    folder.mkdir()
    link.symlink_to("export")
    _export_in_turn(str(link), 1, 1)
    folder.chmod(0o750)

    def rename(*places: Any) -> None:
        done.append(places)
        if when == "full" and len(done) == 4:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
        real(*places)
        if len(done) - 1 == when:
            raise KeyboardInterrupt  # as a signal handler does, between any two lines

    with monkeypatch.context() as patch, pytest.raises((ExportError, KeyboardInterrupt)):
        patch.setattr(os, "rename", rename)
        _export_in_turn(str(folder), 2, 1)
    # Only after the last rename the new export is in place.
    assert (folder / "search.onnx").read_text() == ("2" if when == 3 else "1")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["export", "link"] and link.is_symlink()
    assert stat.S_IMODE(folder.stat().st_mode) == 0o750


@pytest.mark.parametrize("name", ["tracked.mp4", "check.json", "detector.onnx"])
def test_files_of_others_are_not_replaced(name: str, tmp_path: Path) -> None:
    """Neither files that exist before the export, nor files that appear during it."""
    folder = tmp_path / "export"
    _export_in_turn(str(folder), 1, 1)
    (folder / ".search.123.part.engine").touch()  # left by a build that was killed
    with pytest.raises(ExportError, match=f"{name} is not part of a model"), replaced_directory(folder):
        (folder / name).touch()
    with pytest.raises(ExportError, match="is not part of a model"), replaced_directory(folder):
        raise AssertionError("nothing may be written")
    assert (folder / name).exists() and (folder / "search.onnx").exists()


def test_a_folder_of_others_is_not_replaced(tmp_path: Path) -> None:
    """Web apps and browser extensions have a manifest.json too."""
    (tmp_path / "manifest.json").write_text('{"manifest_version": 3}')
    (tmp_path / "src.js").write_text("mine")
    with pytest.raises(ExportError, match="is not a model directory"), replaced_directory(tmp_path):
        raise AssertionError("nothing may be written")
    assert sorted(p.name for p in tmp_path.iterdir()) == ["manifest.json", "src.js"]
    with pytest.raises(ExportError, match="cannot be replaced: name a folder in it"), replaced_directory(Path(".")):
        raise AssertionError("nothing may be written")
