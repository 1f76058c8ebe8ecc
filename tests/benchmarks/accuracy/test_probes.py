"""asymtrack-eval starts and presence."""

from __future__ import annotations

import json

import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.command import main
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from tests.datasets.miniature import write_images


@pytest.fixture
def clips(tmp_path):
    """Six sequences of seven frames. In each, the third frame is not annotated and the last lacks the target."""
    for seed in range(6):
        folder = tmp_path / f"s{seed}"
        clip = list(synthetic_clip(frames=7, size=(160, 120), seed=seed))
        write_images(folder, (frame for frame, _ in clip), "{:08}.png")
        boxes = [tuple(box) for _, box in clip]
        boxes[2], boxes[6] = (float("nan"),) * 4, (0, 0, 5, 5)
        (folder / "absence.label").write_text("0\n" * 6 + "1\n")
        np.savetxt(folder / "groundtruth.txt", boxes, delimiter=",")
    return tmp_path


def test_starts_of_good_and_bad_sequences(clips, tmp_path, capsys):
    report = tmp_path / "starts.json"
    (clips / "s0" / "00000003.png").write_bytes(b"no image")
    (clips / "s1" / "groundtruth.txt").write_text("1,2,3\n")
    (clips / "s2" / "groundtruth.txt").write_text("60,40,40,30\n" + 6 * "nan,nan,nan,nan\n")
    assert main(["starts", str(clips), "--threads", "1", "--json", str(report)]) == 1
    answer = json.loads(report.read_text())
    # Six tracks for each sequence; the target is followed on mirrored frames too.
    assert answer["tracks"] == 18 and 0.75 < answer["success AUC"] < 1
    assert set(answer["sequences"]) == {"s3", "s4", "s5"}
    assert capsys.readouterr().err.count("error: left out: sequence s") == 3 == len(answer["left_out"])


def test_presence_shows_a_lower_score_without_the_target(clips, folder_set, capsys):
    assert main(["presence", str(clips), "--threads", "1"]) == 0
    assert capsys.readouterr().out.split("\n")[1].startswith("present ")
    assert main(["presence", str(clips), "--threads", "1", "--json"]) == 0
    table = json.loads(capsys.readouterr().out)["percentiles of the score"]
    assert table["absent"]["50"] < table["present"]["50"]
    (clips / "s3" / "absence.label").write_text("0\n" * 4 + "1\n" * 3)
    for root, number in ((folder_set, 0), (clips, 5)):
        assert main(["presence", str(root)]) == 2
        assert f"with the target in frame 5: {root} has {number}" in capsys.readouterr().err
