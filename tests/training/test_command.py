"""``asymtrack-train`` as it is typed, and labelling of video."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Sequence

import cv2
import numpy as np
import pytest
import torch
from safetensors.torch import load_file

from asymtrack_edge.training.command import main
from asymtrack_edge.training.imagery import CLIP, load_pool
from asymtrack_edge.training.recipes import PAPER
from asymtrack_edge.training.run import RunConfig
from tests.training.conftest import moving, picture

QUICK = ["--batch", "2", "--device", "cpu", "--threads", "1", "--search-size", "64", "--time-budget", "0.1"]


class Follower:
    """Finds the moving square by its texture."""

    def init(self, frame: np.ndarray, box: Sequence[float]) -> None:
        x, y, w, h = (round(v) for v in box)
        self.size = box[2:]
        self.patch = frame[max(0, y) : y + h, max(0, x) : x + w].copy()

    def update(self, frame: np.ndarray) -> Any:
        found = cv2.minMaxLoc(cv2.matchTemplate(frame, self.patch, cv2.TM_SQDIFF))[2]
        return SimpleNamespace(box=(*found, *self.size), score=1.0)


class Drifter(Follower):
    """Moves on to the right, whatever it sees."""

    def init(self, frame: np.ndarray, box: Sequence[float]) -> None:
        self.box = list(box)

    def update(self, frame: np.ndarray) -> Any:
        self.box[0] += 40
        return SimpleNamespace(box=tuple(self.box), score=1.0)


def write_video(path: Path, frames: List[np.ndarray]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    height, width = frames[0].shape[:2]
    video = cv2.VideoWriter(str(path), cv2.VideoWriter_fourcc(*"MJPG"), 25, (width, height))
    assert video.isOpened()
    for frame in frames:
        video.write(frame)
    video.release()


def test_paper_preset_starts_on_published_layouts(got10k: Path, coco: Path, tmp_path: Path) -> None:
    roots, folder = {"got10k": str(got10k), "coco": str(coco)}, tmp_path / "r"
    data = [word for name, root in roots.items() for word in (f"--{name}", root)]
    assert main(["--preset", "paper", *data, "--output", str(folder), *QUICK]) == 0
    state = json.loads((folder / "state.json").read_text())
    assert state["step"] >= 1 and state["pairs"] == 2 * state["step"]
    assert RunConfig.load(folder) == RunConfig(replace(PAPER, batch=2), datasets=roots, search_size=64)
    weights = load_file(str(folder / "weights.safetensors"))
    assert all(torch.isfinite(value).all() for value in weights.values())


def test_a_run_goes_on_with_its_own_recipe(collection: Path, tmp_path: Path, capsys: Any) -> None:
    folder = str(tmp_path / "t")
    first = ["--preset", "small", "--data", str(collection), "--canvas", "128", "--lr", "2e-4", "--output", folder]
    assert main([*first, *QUICK, "--json", str(tmp_path / "result.json")]) == 0
    result = json.loads((tmp_path / "result.json").read_text())
    assert result["folder"] == folder and result["pairs"] >= 2 and not result["finished"]
    before = json.loads((tmp_path / "t" / "state.json").read_text())["step"]
    assert f"--resume {folder}" in capsys.readouterr().err
    assert main(["--resume", folder, "--time-budget", "0.1", "--device", "cpu"]) == 0
    stored = json.loads((tmp_path / "t" / "run.json").read_text())
    assert stored["recipe"]["lr"] == 2e-4 and stored["search_size"] == 64 and stored["canvas"] == 128
    assert json.loads((tmp_path / "t" / "state.json").read_text())["step"] > before
    assert (tmp_path / "t" / "plot.png").read_bytes().startswith(b"\x89PNG")
    assert main(["plot", folder]) == 0 and "plot.png" in capsys.readouterr().out
    # The same folder is not trained over by accident.
    assert main([*first, *QUICK]) == 2
    assert "--resume" in capsys.readouterr().err


def test_fine_tuning_starts_from_a_file(collection: Path, tmp_path: Path) -> None:
    data = ["--preset", "small", "--data", str(collection), *QUICK]
    assert main([*data, "--output", str(tmp_path / "a")]) == 0
    start = tmp_path / "a" / "weights.safetensors"
    assert main([*data, "--init", str(start), "--seed", "9", "--lr", "1e-9", "--output", str(tmp_path / "b")]) == 0
    a, b = load_file(str(start)), load_file(str(tmp_path / "b" / "weights.safetensors"))
    torch.testing.assert_close(a["bottleneck.weight"], b["bottleneck.weight"], atol=1e-4, rtol=0)


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "small"], "--data"),
        (["--preset", "small", "--data", "nowhere"], "nowhere"),
        (["--got10k", "nowhere"], "nowhere"),
        (["--variant", "X", "--data", "."], "choose one of"),
        (["--search-size", "100", "--data", "."], "multiples of 32"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", ".", "--output", "other"], "leave out --output"),
        (["--resume", "."], "holds no run"),
        (["plot", "nowhere"], "nowhere"),
        (["--data", ".", "--device", "cuda:99"], "cuda:99"),
        (["--data", ".", "--init", "nowhere.pth"], "nowhere.pth"),
        (["--lr", "-1"], "--lr"),
    ],
)
def test_a_users_mistake_is_one_line_and_code_2(
    arguments: List[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    error = capsys.readouterr().err
    assert code == 2 and says in error and "Traceback" not in error and len(error.strip().splitlines()) == 1


def test_any_folder_of_videos_becomes_training_data(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    for n in range(2):
        frames = [cv2.resize(f, None, fx=4, fy=4, interpolation=cv2.INTER_NEAREST) for f in moving(n, 24)]
        write_video(videos / "deep" / f"{n}.avi", frames)
    monkeypatch.setattr("asymtrack_edge.Tracker.load", lambda **_: Drifter())
    assert main(["label", str(videos), "--output", str(tmp_path / "none")]) == 0
    assert "none: 0 tracks" in capsys.readouterr().out
    (videos / "broken.avi").write_bytes(b"no video")
    monkeypatch.setattr("asymtrack_edge.Tracker.load", lambda **_: Follower())
    assert main(["label", str(videos), "--output", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: left out: cannot open the video") and len(said.err.splitlines()) == 1
    pool = load_pool([out], 256)
    assert set(pool.kind.tolist()) == {CLIP} and f": {len(pool)} tracks" in said.out and len(pool) > 0
    assert pool.length.max() == 8 and pool.sizes.max() == 256
    # What is done already is not done again.
    (videos / "broken.avi").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    assert main(["label", str(videos), "--output", str(out)]) == 0
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == before
    # A run does the same before it trains.
    cv2.imwrite(str(videos / "still.png"), picture(0))
    assert main(["--preset", "small", "--data", str(videos), "--output", str(tmp_path / "r"), *QUICK]) == 0
    assert json.loads((tmp_path / "r" / "labels" / "0" / "deep" / "1.avi" / "clips.json").read_text())
    for video in (videos / "deep").iterdir():
        video.write_bytes(b"no video")
    assert main(["label", str(videos), "--output", str(tmp_path / "bad")]) == 2
    assert not (tmp_path / "bad").exists()


@pytest.mark.slow
def test_labels_made_on_a_cluster_are_those_made_here(tmp_path: Path, capsys: Any) -> None:
    ray = pytest.importorskip("ray", reason="Ray, of the extra 'ray', is not installed")
    frames = [cv2.resize(f, None, fx=3, fy=3, interpolation=cv2.INTER_NEAREST) for f in moving(0, 24)]
    for name in "abc":
        write_video(tmp_path / "videos" / f"{name}.avi", frames + frames[::-1])
    (tmp_path / "videos" / "b.avi").write_bytes(b"no video")
    try:
        for name, options in (("here", []), ("there", ["--ray", "local"])):
            assert main(["label", str(tmp_path / "videos"), "--output", str(tmp_path / name), *options]) == 1
            assert "left out: cannot open the video" in capsys.readouterr().err
        made = sorted(path.relative_to(tmp_path / "here") for path in (tmp_path / "here").rglob("clips.*"))
        assert made == [Path(name, f"clips.{kind}") for name in ("a.avi", "c.avi") for kind in ("json", "tar")]
        assert all((tmp_path / "here" / p).read_bytes() == (tmp_path / "there" / p).read_bytes() for p in made)
    finally:
        ray.shutdown()
