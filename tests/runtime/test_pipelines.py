"""Pipelines in a process of their own, with a script in place of ``gst-launch-1.0``."""

from __future__ import annotations

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from asymtrack_edge.runtime.sources import cameras
from asymtrack_edge.runtime.sources.cameras import _PipedPipeline

ROOT = Path(__file__).parents[2]
#: Writes its number to a file, a header and a picture to its output, and is silent from then on.
SCRIPT = """#!/bin/sh
echo $$ > "{pid}"
{header}
exec sleep 60
"""
HEADER = "printf 'YUV4MPEG2 W4 H2 F30:1\\nFRAME\\n123456789012'"


@pytest.fixture
def launcher(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Path:
    script = tmp_path / "bin" / "gst-launch-1.0"
    script.parent.mkdir()
    script.write_text(SCRIPT.format(pid=tmp_path / "pid", header=HEADER))
    script.chmod(0o755)
    monkeypatch.setenv("PATH", f"{script.parent}:{os.environ['PATH']}")
    return script


def gone(folder: Path) -> bool:
    """Whether the process is no more, after some time at most."""
    number = int((folder / "pid").read_text())
    for _ in range(100):
        try:
            os.kill(number, 0)
        except ProcessLookupError:
            return True
        if Path(f"/proc/{number}/stat").read_text().split()[2] == "Z":
            return True
        time.sleep(0.02)
    return False


def test_pictures_come_until_it_is_released(launcher: Path, tmp_path: Path) -> None:
    pipeline = _PipedPipeline("videotestsrc")
    assert pipeline.grab()
    good, picture = pipeline.retrieve()
    assert good and picture is not None and picture.shape == (2, 4, 3)
    pipeline.release()
    pipeline.release()
    assert gone(tmp_path)
    # The number of its descriptor may belong to somebody else now.
    reading, writing = os.pipe()
    os.write(writing, b"somebody's request")
    assert not pipeline.grab()
    assert os.read(reading, 99) == b"somebody's request"
    os.close(reading)
    os.close(writing)


def test_interrupted_while_it_starts_the_process_is_ended(
    launcher: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    launcher.write_text(SCRIPT.format(pid=tmp_path / "pid", header=""))

    def interrupted(self: _PipedPipeline, timeout: float) -> bytes:
        while not (tmp_path / "pid").exists() or not (tmp_path / "pid").read_text():
            time.sleep(0.01)
        raise KeyboardInterrupt

    monkeypatch.setattr(_PipedPipeline, "_line", interrupted)
    with pytest.raises(KeyboardInterrupt):
        _PipedPipeline("videotestsrc")
    assert gone(tmp_path)


def test_a_program_that_ends_without_releasing_leaves_no_process(launcher: Path, tmp_path: Path) -> None:
    code = "from asymtrack_edge.runtime.sources.cameras import _PipedPipeline; kept = _PipedPipeline('videotestsrc')"
    subprocess.run([sys.executable, "-c", code], cwd=ROOT, check=True, timeout=30)
    assert gone(tmp_path)


def test_one_line_says_why_it_does_not_start(launcher: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    launcher.write_text("#!/bin/sh\necho 'no element nosuchsrc' >&2\n")
    with pytest.raises(cameras.SourceError, match="no element nosuchsrc"):
        _PipedPipeline("nosuchsrc")
