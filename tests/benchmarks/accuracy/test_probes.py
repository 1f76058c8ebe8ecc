"""asymtrack-eval starts and presence."""

from __future__ import annotations

import json
import shutil

import cv2
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.command import main
from asymtrack_edge.benchmarks.accuracy.probes import track_aucs
from asymtrack_edge.datasets import open_dataset
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import State, Track
from asymtrack_edge.runtime.sources.clip import synthetic_clip


@pytest.fixture
def clips(tmp_path):
    """Six sequences of seven frames; the third frame of each is not annotated."""
    for seed in range(6):
        folder = tmp_path / f"s{seed}"
        folder.mkdir()
        clip = list(synthetic_clip(frames=7, size=(160, 120), seed=seed))
        for i, (frame, _) in enumerate(clip):
            cv2.imwrite(str(folder / f"{i:08}.png"), frame)
        boxes = [tuple(box) for _, box in clip]
        boxes[2] = (float("nan"),) * 4
        np.savetxt(folder / "groundtruth.txt", boxes, delimiter=",")
    return tmp_path


class Knowing:
    """Answers with the true boxes of a sequence, mirrored from the fourth track on."""

    def __init__(self, truth: np.ndarray, width: int) -> None:
        self.truth, self.width, self.tracks = truth, width, 0

    def init(self, frame: np.ndarray, box: np.ndarray) -> None:
        self.now = self.truth.copy()
        if self.tracks >= 3:
            self.now[:, 0] = self.width - self.now[:, 0] - self.now[:, 2]
        self.tracks += 1
        self.at = int(np.flatnonzero((self.now == box).all(1))[0])

    def update(self, frame: np.ndarray) -> Track:
        self.at += 1
        return Track(Box(*np.nan_to_num(self.now[self.at])), 1.0, State.TRACKING)


def test_every_track_of_one_who_knows_is_perfect(clips):
    sequence = open_dataset("folder", clips).sequence("s0")
    # Overlap 1 is above 20 of the 21 thresholds.
    assert track_aucs(Knowing(sequence.truth, 160), sequence) == pytest.approx([20 / 21] * 6)


def test_starts(clips, tmp_path, capsys):
    report = tmp_path / "starts.json"
    (clips / "s0" / "00000003.png").write_bytes(b"no image")
    (clips / "s1" / "groundtruth.txt").write_text("1,2,3\n")
    for i in (4, 5):
        shutil.rmtree(clips / f"s{i}")
    assert main(["starts", str(clips), "--threads", "1", "--json", str(report)]) == 1
    answer = json.loads(report.read_text())
    assert answer["tracks"] == 12 and 0 <= answer["success AUC"] <= 1
    assert set(answer["sequences"]) == {"s2", "s3"}
    assert capsys.readouterr().err.count("error: left out: ") == 2


def test_presence_the_score_falls_without_the_target(clips, capsys):
    assert main(["presence", str(clips), "--threads", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    table = answer["percentiles of the score"]
    assert answer["sequences"] == 6
    assert table["absent"]["50"] < table["present"]["50"]


def test_too_few_sequences_are_named(folder_set, capsys):
    assert main(["presence", str(folder_set)]) == 2
    assert "more than 5 sequences" in capsys.readouterr().err
