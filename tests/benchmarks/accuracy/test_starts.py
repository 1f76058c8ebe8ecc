from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.starts import main, track_aucs
from asymtrack_edge.datasets import open_dataset
from asymtrack_edge.geometry import Box
from asymtrack_edge.runtime import State, Track
from tests.runtime.simulated import moving_square


def _sequences(root: Path, frames: int = 8) -> Path:
    for name in ("one", "two"):
        folder = root / name
        folder.mkdir(parents=True)
        clip = list(moving_square(frames))
        for i, (frame, _) in enumerate(clip):
            cv2.imwrite(str(folder / f"{i:08}.png"), frame)
        boxes = [tuple(box) for _, box in clip]
        boxes[2] = (float("nan"),) * 4  # not annotated: no track starts here, none is judged here
        np.savetxt(folder / "groundtruth.txt", boxes, delimiter=",")
    return root


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


def test_every_track_of_one_who_knows_is_perfect(tmp_path: Path) -> None:
    sequence = next(open_dataset("folder", _sequences(tmp_path)).sequences())
    width = sequence.read(0).shape[1]
    aucs = track_aucs(Knowing(sequence.truth, width), sequence)  # type: ignore[arg-type]
    # Overlap 1 is above 20 of the 21 thresholds.
    assert aucs == pytest.approx([20 / 21] * 6)


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    assert main([str(_sequences(tmp_path)), "--threads", "1"]) == 0
    answer = json.loads(capsys.readouterr().out)
    assert answer["tracks"] == 12 and 0 <= answer["success AUC"] <= 1
    assert set(answer["sequences"]) == {"one", "two"}
