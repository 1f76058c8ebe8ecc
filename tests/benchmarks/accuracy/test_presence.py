from __future__ import annotations

import json
from pathlib import Path

import cv2
import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.presence import main
from asymtrack_edge.runtime.sources.clip import synthetic_clip


def _sequence(folder: Path, seed: int) -> None:
    folder.mkdir(parents=True)
    clip = list(synthetic_clip(frames=8, size=(160, 120), seed=seed))
    for i, (frame, _) in enumerate(clip):
        cv2.imwrite(str(folder / f"{i:08}.png"), frame)
    np.savetxt(folder / "groundtruth.txt", [box for _, box in clip], delimiter=",")


def test_the_score_falls_without_the_target(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for seed in range(6):
        _sequence(tmp_path / f"s{seed}", seed)
    assert main([str(tmp_path)]) == 0
    answer = json.loads(capsys.readouterr().out)
    table = answer["percentiles of the score"]
    assert answer["sequences"] == 6
    assert table["absent"]["50"] < table["present"]["50"]


def test_too_few_sequences_are_named(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    _sequence(tmp_path / "only", 0)
    assert main([str(tmp_path)]) == 2
    assert "more than 5 sequences" in capsys.readouterr().err
