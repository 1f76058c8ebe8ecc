"""Tests for a device that has only Python 3.8, numpy, OpenCV, ONNX Runtime and perhaps OpenVINO.

These tests use the installed package and the bundled weights only, and import no torch.
"""

from __future__ import annotations

import json
from pathlib import Path

import pytest

from asymtrack_edge.files import write_image
from asymtrack_edge.geometry import iou
from asymtrack_edge.runtime import State, Tracker
from asymtrack_edge.runtime.commands.track import main as track
from asymtrack_edge.runtime.sources.clip import synthetic_clip


@pytest.mark.parametrize(("model", "backend"), [("T", "auto"), ("S", "auto"), ("B", "auto"), ("T", "openvino")])
def test_bundled_weights_follow_a_moving_target(model: str, backend: str) -> None:
    if backend == "openvino":
        pytest.importorskip("openvino")
    clip = list(synthetic_clip(frames=30))
    tracker = Tracker.load(model, backend, threads=1)
    tracker.init(*clip[0])
    tracks = [tracker.update(frame) for frame, _ in clip[1:]]
    overlaps = [iou(track.box, box) for track, (_, box) in zip(tracks, clip[1:])]
    assert sum(overlaps) / len(overlaps) > 0.5
    assert tracks[-1].state is State.TRACKING and all(0 <= track.score <= 1 for track in tracks)


def test_command_tracks_a_folder(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    clip = list(synthetic_clip(frames=8))
    for i, (frame, _) in enumerate(clip):
        write_image(tmp_path / f"{i}.png", frame)
    box, out = ",".join(str(v) for v in clip[0][1]), tmp_path / "out"
    out.mkdir()
    outputs = ["--boxes", str(out / "boxes.csv"), "--output", str(out / "out.mp4"), "--json"]
    assert track([str(tmp_path), "--box", box, *outputs]) == 0
    assert json.loads(capsys.readouterr().out.splitlines()[-1])["frames"] == 8
    rows = (out / "boxes.csv").read_text().splitlines()
    assert rows[0] == "frame,x,y,w,h,score,state"
    assert [row.split(",")[0] for row in rows[1:]] == [str(i) for i in range(8)]
    assert (out / "out.mp4").stat().st_size > 1000
