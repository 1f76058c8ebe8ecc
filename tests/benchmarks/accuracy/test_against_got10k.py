"""Readers and metrics together, compared with the experiments of the got10k package on the same folders."""

from __future__ import annotations

import json

import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.command import main
from tests.datasets.miniature import rows, save, write_frames

pytest.importorskip("six", reason="got10k's data sets need six, which the package does not declare")


def track(rng, count):
    """Random ground truth, partly outside frames of 32 x 24, and a result near it."""
    truth = np.column_stack([rng.uniform(1, 24, (count, 2)), rng.uniform(3, 16, (count, 2))]).round(3)
    boxes = truth + rng.normal(0, 2, truth.shape)
    boxes[:, 2:] = np.abs(boxes[:, 2:]) + 1
    return truth, boxes.round(3)


def ours(name, root, results, tmp_path):
    report = tmp_path / "report.json"
    assert main([name, str(root), "--results", str(results), "--json", str(report)]) == 0
    return json.loads(report.read_text())["trackers"][0]


def test_got10k_val(tmp_path):
    from got10k.experiments import ExperimentGOT10k

    rng, names = np.random.default_rng(0), [f"GOT-10k_Val_{i:06d}" for i in (1, 2, 3)]
    results = tmp_path / "results" / "GOT-10k" / "x"
    for count, name in zip((9, 12, 20), names):
        folder = tmp_path / "val" / name
        truth, boxes = track(rng, count)
        write_frames(folder, count)
        save(folder / "groundtruth.txt", truth)
        for label in ("cover", "absence", "cut_by_image"):
            save(folder / f"{label}.label", rng.integers(0, 9, (count, 1)))
        save(folder / "meta_info.ini", "[METAINFO]\nresolution: (32, 24)\n")
        save(results / name / f"{name}_001.txt", boxes)
        save(results / name / f"{name}_time.txt", rng.uniform(0.01, 0.1, (count, 1)))
    save(tmp_path / "val" / "list.txt", "\n".join(names))
    experiment = ExperimentGOT10k(str(tmp_path), "val", str(tmp_path / "results"), str(tmp_path / "reports"))
    theirs = experiment.report(["x"])["x"]["overall"]
    found = ours("got10k-val", tmp_path, results, tmp_path)
    assert found["metrics"]["ao"] == pytest.approx(theirs["ao"], abs=1e-6)
    assert found["metrics"]["sr0.5"] == pytest.approx(theirs["sr"], abs=1e-6)
    assert found["speed"]["mean_of_rates"] == pytest.approx(theirs["speed_fps"], abs=1e-6)
    np.testing.assert_allclose(found["curves"]["success"]["values"], theirs["succ_curve"], atol=1e-6)


def test_otb(tmp_path):
    from got10k.datasets import OTB
    from got10k.experiments import ExperimentOTB

    root, results, rng = tmp_path / "data", tmp_path / "results" / "OTB2015" / "x", np.random.default_rng(0)
    for name, images, targets in (("Boy", 9, [""]), ("Jogging", 7, [".1", ".2"]), ("Football1", 76, [""])):
        write_frames(root / name / "img", images, "{:04d}.jpg")
        for target in targets:
            truth, boxes = track(rng, min(images, 74))
            save(root / name / f"groundtruth_rect{target}.txt", rows(truth, "\t"))
            save(results / f"{name}{target}.txt", boxes)
    # Made without its constructor, which downloads missing sequences.
    experiment = ExperimentOTB.__new__(ExperimentOTB)
    experiment.dataset = OTB(str(root), 2015, download=False)
    experiment.result_dir, experiment.report_dir = str(results.parent), str(tmp_path / "reports")
    experiment.nbins_iou, experiment.nbins_ce = 21, 51
    theirs = experiment.report(["x"])["x"]
    found = ours("otb", root, results, tmp_path)
    assert sorted(found["sequences"]) == sorted(theirs["seq_wise"])
    for name, scores in theirs["seq_wise"].items():
        assert found["sequences"][name]["auc"] == pytest.approx(scores["success_score"], abs=1e-6)
    assert found["metrics"]["precision"] == pytest.approx(theirs["overall"]["precision_score"], abs=1e-6)
