"""``asymtrack-train`` from its command line."""

from __future__ import annotations

import fcntl
import json
import shutil
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path
from types import SimpleNamespace
from typing import Any, List, Sequence
from unittest.mock import MagicMock

import cv2
import numpy as np
import pytest
import torch
from safetensors import safe_open
from safetensors.torch import load_file, save_file

from asymtrack_edge.checkpoints import open_checkpoint
from asymtrack_edge.training import command, labels
from asymtrack_edge.training.command import main
from asymtrack_edge.training.imagery import CLIP, load_pool
from asymtrack_edge.training.recipes import PAPER
from asymtrack_edge.training.run import RunConfig
from asymtrack_edge.training.state import has_state
from asymtrack_edge.variants import VARIANTS
from tests.helpers import refusal
from tests.runtime.simulated import write_video
from tests.test_docs import blocks
from tests.training.conftest import BOXES, moving, picture

QUICK = ["--batch", "2", "--device", "cpu", "--threads", "1", "--time-budget", "0.1"]


class Follower:
    """Finds the moving square by its texture; with ``drift``, its box only moves right by so many pixels per frame."""

    def __init__(self, drift: float = 0.0) -> None:
        self.drift = drift

    def init(self, frame: np.ndarray, box: Sequence[float]) -> None:
        x, y, w, h = (round(v) for v in box)
        self.box = list(box)
        self.patch = frame[max(0, y) : y + h, max(0, x) : x + w].copy()

    def update(self, frame: np.ndarray) -> Any:
        if self.drift:
            self.box[0] += self.drift
        else:
            self.box[:2] = cv2.minMaxLoc(cv2.matchTemplate(frame, self.patch, cv2.TM_SQDIFF))[2]
        return SimpleNamespace(box=tuple(self.box))


def weights_of(folder: Path) -> Any:
    """A tensor of the weights that a run wrote, and the number of pairs it had trained on."""
    with safe_open(str(folder / "weights.safetensors"), "pt") as file:
        return file.get_tensor("bottleneck.weight").float(), int(file.metadata()["pairs"])


def test_the_paper_preset_starts_on_published_layouts(got10k: Path, tmp_path: Path) -> None:
    assert main(["--preset", "paper", "--got10k", str(got10k), "--output", str(tmp_path), *QUICK]) == 0
    config = RunConfig.load(tmp_path)
    assert config == RunConfig(replace(PAPER, batch=2), datasets={"got10k": str(got10k)})
    moved = command.make_parser().parse_args(["run", "--resume", ".", "--lasot", "/new"])
    assert command._configure(moved, config).datasets == {"got10k": str(got10k), "lasot": "/new"}
    weights, pairs = weights_of(tmp_path)
    assert torch.isfinite(weights).all() and pairs >= 2


def test_data_without_pairs_leaves_no_run(got10k: Path, tmp_path: Path) -> None:
    root = shutil.copytree(got10k, tmp_path / "got")
    for image in root.glob("train/*/*.jpg"):
        image.write_bytes(b"no image")
    assert main(["--got10k", str(root), "--output", str(tmp_path / "r"), *QUICK]) == 2
    assert not has_state(tmp_path / "r")


def test_a_run_resumes_with_its_recipe_and_its_weights_start_another_run(
    collection: Path, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    folder, other, result = tmp_path / "runs" / "a", tmp_path / "runs" / "b", tmp_path / "result.json"
    first = ["--preset", "small", "--data", str(collection), "--canvas", "128", *QUICK]
    assert main([*first, "--lr", "2e-4", "--output", str(folder), "--json", str(result)]) == 0
    start, pairs = weights_of(folder)
    said = json.loads(result.read_text())
    assert said["folder"] == str(folder) and said["pairs"] >= 2 and not said["finished"]
    assert f"--resume {folder}" in capsys.readouterr().err
    # Fine-tuning. Resuming does not need the initial weights; a new --lr resets the factor that lowers the rate.
    init = Path(shutil.copy(folder / "weights.safetensors", tmp_path))
    assert main([*first, "--init", str(init), "--seed", "9", "--lr", "1e-9", "--output", str(other)]) == 0
    torch.testing.assert_close(weights_of(other)[0], start, atol=1e-4, rtol=0)
    init.unlink()
    state = other / "state.safetensors"
    for lr, rate in (("1e-9", 0.5), ("2e-9", 1.0)):
        with safe_open(state, "pt") as file:
            counts = {**json.loads(file.metadata()["counts"]), "rate": 0.5}
        save_file(load_file(state), state, {"counts": json.dumps(counts)})
        assert main(["--resume", str(other), "--lr", lr, "--time-budget", "0.1", "--device", "cpu"]) == 0
        with safe_open(state, "pt") as file:
            assert json.loads(file.metadata()["counts"])["rate"] == rate
    # The mean of two runs, with the code in docs/training.md.
    monkeypatch.chdir(tmp_path)
    (averaging,) = blocks(Path(__file__).parents[2] / "docs" / "training.md", "python")
    exec(averaging, {})
    mean = open_checkpoint("mean.safetensors").tensors(VARIANTS["T"])["bottleneck.weight"]
    torch.testing.assert_close(mean, start, atol=1e-4, rtol=0)
    assert main(["--resume", str(folder), "--time-budget", "0.1", "--device", "cpu"]) == 0
    config = RunConfig.load(folder)
    assert (config.recipe.lr, config.canvas) == (2e-4, 128)
    assert weights_of(folder)[1] > pairs
    (folder / "plot.png").unlink()
    assert main(["plot", str(folder)]) == 0 and "plot.png" in capsys.readouterr().out
    assert (folder / "plot.png").read_bytes().startswith(b"\x89PNG")
    # A new run does not overwrite the folder of an old one.
    assert main([*first, "--output", str(folder)]) == 2
    assert "--resume" in capsys.readouterr().err
    for text in ((folder / "run.json").read_text().replace('"ema"', '"momentum"'), "[" * 99_999):
        (folder / "run.json").write_text(text)
        assert main(["--resume", str(folder)]) == 2 and "does not fit this version" in capsys.readouterr().err


def test_a_run_ended_by_a_signal_is_saved(collection: Path, tmp_path: Path) -> None:
    words = ["--preset", "small", "--data", str(collection), "--output", str(tmp_path / "r"), *QUICK[:-2]]
    run = subprocess.Popen([sys.executable, "-m", "asymtrack_edge", "train", *words], stderr=subprocess.PIPE, text=True)
    log = tmp_path / "r" / "log.jsonl"
    while run.poll() is None and not (log.exists() and log.stat().st_size):
        time.sleep(0.1)
    run.send_signal(signal.SIGTERM)
    assert "continue with: asymtrack-train --resume" in run.communicate(timeout=60)[1]
    assert run.returncode == 143 and weights_of(tmp_path / "r")[1] > 0


@pytest.mark.parametrize(
    ("arguments", "says"),
    [
        (["--preset", "small"], "--data"),
        (["--preset", "small", "--data", "nowhere"], "nowhere"),
        (["--got10k", "nowhere"], "nowhere"),
        (["--variant", "X", "--preset", "small", "--data", "x"], "choose one of"),
        (["--resume", "nowhere"], "nowhere"),
        (["--resume", ".", "--output", "other"], "leave out --output"),
        (["--resume", ".", "--init", "S"], "leave out --preset, --init"),
        (["--data", "x"], "--preset small"),
        (["plot", "nowhere"], "nowhere"),
        (["--preset", "small", "--data", "x", "--device", "cuda:99"], "cuda:99"),
        (["--preset", "small", "--data", "x", "--init", "nowhere.pth"], "nowhere.pth"),
        (["--lr", "-1"], "--lr"),
        (["label", "."], "no videos"),
        (["--preset", "small", "--data", "."], "lies in the data"),
    ],
)
def test_mistakes_are_one_line_and_exit_2(
    arguments: List[str], says: str, tmp_path: Path, monkeypatch: Any, capsys: Any
) -> None:
    monkeypatch.chdir(tmp_path)
    assert says in refusal(main, arguments, capsys)


@pytest.mark.parametrize(
    ("more", "trained"), [((), "T"), (("--init", "s"), "S"), (("--init", "S", "--variant", "B"), "B")]
)
def test_bundled_initial_weights_decide_the_variant(more: Sequence[str], trained: str) -> None:
    arguments = command.make_parser().parse_args(["run", "--preset", "small", "--data", ".", *more])
    assert command._configure(arguments, None).variant == trained


def test_too_little_memory_is_one_line(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    for error in (RuntimeError("out of memory"), RuntimeError("can't allocate"), MemoryError("Unable to allocate")):
        monkeypatch.setattr("asymtrack_edge.training.run.train", MagicMock(side_effect=error))
        said = refusal(main, ["--preset", "small", "--data", ".", "--output", str(tmp_path)], capsys)
        assert said == "error: not enough memory: give a smaller --batch or --canvas, or less --data"


def test_tracks_are_kept_if_forward_and_backward_agree(tmp_path: Path, monkeypatch: Any) -> None:
    assert labels.forward_backward(Follower(), moving(1, 8), BOXES[0])[1] == pytest.approx([1] * 8)
    monkeypatch.setattr(labels, "read_clips", lambda _: iter([moving(0, 16)]))
    monkeypatch.setattr(labels, "forward_backward", lambda *_: ([[1.0] * 4] * 16, [1.0] * 15 + [0.4]))
    assert labels.label_video(tmp_path, None, tmp_path / "v.avi")[1] == []


def test_a_damaged_frame_loses_only_its_clip(tmp_path: Path, monkeypatch: Any) -> None:
    length = labels.FRAMES * labels.STRIDE
    numbers, now = iter(range(40 * length)), [0]

    def grab() -> bool:
        now[0] = next(numbers, -1)
        return now[0] >= 0

    def retrieve() -> Any:
        return (False, None) if now[0] == labels.STRIDE else (True, np.full((2, 2), now[0]))

    video = SimpleNamespace(isOpened=lambda: True, get=lambda _: 40 * length, grab=grab, retrieve=retrieve)
    monkeypatch.setattr(labels, "open_video", lambda _: video)
    monkeypatch.setattr(labels, "shrink", lambda frame, _: (frame, 1.0))
    clips = [[int(frame[0, 0]) for frame in clip] for clip in labels.read_clips(tmp_path)]
    assert len(clips) > 2 and all(0 < clip[-1] - clip[0] < length for clip in clips)


def test_folders_of_videos_become_training_data(tmp_path: Path, monkeypatch: Any, capsys: Any) -> None:
    videos, out = tmp_path / "videos", tmp_path / "out"
    (videos / "deep").mkdir(parents=True)
    for n in range(2):
        write_video(videos / "deep" / f"{n}.avi", 24)
    monkeypatch.setattr("asymtrack_edge.Tracker.load", lambda **_: Follower(40.0))
    assert "holds the videos" in refusal(main, ["label", str(videos), "--output", str(videos)], capsys)
    assert main(["label", str(videos), "--output", str(tmp_path / "none")]) == 1
    assert "none: 0 tracks" in capsys.readouterr().out
    (videos / "broken.avi").write_bytes(b"no video")
    monkeypatch.setattr("asymtrack_edge.Tracker.load", lambda **_: Follower())
    assert main(["label", str(videos), "--output", str(out)]) == 1
    said = capsys.readouterr()
    assert said.err.startswith("error: left out: cannot open the video") and len(said.err.splitlines()) == 1
    pool = load_pool([out], 256)
    assert set(pool.kind.tolist()) == {CLIP} and f": {len(pool)} tracks" in said.out and len(pool) > 0
    assert pool.length.max() == 8 and pool.sizes.max() == 256
    # Videos that are already labelled are not labelled again.
    (videos / "broken.avi").unlink()
    before = {p: p.stat().st_mtime_ns for p in out.rglob("*.*")}
    assert main(["label", str(videos), "--output", str(out)]) == 0 and "2 videos are lab" in capsys.readouterr().err
    assert {p: p.stat().st_mtime_ns for p in out.rglob("*.*")} == before
    # A training run labels videos in the same way before it trains.
    cv2.imwrite(str(videos / "still.png"), picture(0))
    assert main(["--preset", "small", "--data", str(videos), "--output", str(tmp_path / "r"), *QUICK]) == 0
    (index,) = (tmp_path / "r" / "labels").glob("0-*/deep/1.avi/clips.json")
    assert json.loads(index.read_text())
    with open(tmp_path / "r" / "log.jsonl") as log:
        fcntl.flock(log, fcntl.LOCK_EX)
        assert main(["--resume", str(tmp_path / "r")]) == 2
    assert "another process is training in" in capsys.readouterr().err
    for video in (videos / "deep").iterdir():
        video.write_bytes(b"no video")
    assert main(["label", str(videos), "--output", str(tmp_path / "bad")]) == 1 and not (tmp_path / "bad").exists()
    assert main(["--preset", "small", "--data", str(videos), "--output", str(tmp_path / "s"), *QUICK]) == 1
    assert capsys.readouterr().err.splitlines()[-1].startswith("left out: 2 files")
