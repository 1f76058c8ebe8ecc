"""Metrics compared with cases computed by hand."""

from __future__ import annotations

import numpy as np
import pytest

from asymtrack_edge.benchmarks.accuracy.metrics import PROTOCOLS, score_sequence, summarise
from asymtrack_edge.benchmarks.accuracy.results import speed
from asymtrack_edge.datasets import Sequence
from asymtrack_edge.datasets.sequences import Frames
from asymtrack_edge.errors import DatasetError


class Drawn(Sequence):
    """A sequence of 640 x 480 pixels without files."""

    def read(self, index):
        return np.zeros((480, 640, 3), np.uint8)


def sequence(truth, name="s", absent=None):
    truth = np.asarray(truth, np.float64)
    frames = Frames("", (f"{i}.jpg" for i in range(len(truth))))
    return Drawn(name, frames, truth, absent=None if absent is None else np.array(absent, bool))


def score(protocol, truth, boxes, **kwargs):
    return score_sequence(PROTOCOLS[protocol], sequence(truth, **kwargs), np.asarray(boxes, np.float64))


TRUTH = [(10, 10, 20, 20)] * 4
#: Perfect, half covered, 30 pixels away, perfect.
BOXES = [(10, 10, 20, 20), (10, 10, 20, 10), (40, 10, 20, 20), (10, 10, 20, 20)]
#: The last box touches the border (x = 0): toolkits that require four positive numbers do not count it as a box.
BORDER = [*BOXES, (0, 10, 20, 20)]
#: Invalid boxes in the second and third frame; with 0 for nan, the first would overlap the target.
BROKEN = [BOXES[0], (np.nan, 10, 20, 20), (10, 10, 0, 20), BOXES[3]]
NONE, HERE, FAR = (np.nan,) * 4, (10, 10, 20, 20), (52.5, 60.6, 23.3, 80.8)


@pytest.mark.parametrize(
    ("protocol", "truth", "boxes", "absent", "expected"),
    [
        # Frame 0 counts as perfect whatever the result says; 0.5 is not greater than 0.5. Overlaps 1, 0.5, 0, 1: three
        # above t = 0 .. 0.45 (10 thresholds), two above 0.5 .. 0.95. Errors 0, 5, 30, 0 pixels; 0, 0.25, 1.5, 0 boxes.
        ("otb", TRUTH, [(0, 0, 1, 1), *BOXES[1:]], None,
         {"auc": 12.5 / 21, "sr50": 0.5, "precision": 0.75, "norm_precision": 0.5}),
        # Frame 0 does not count, nor do frames without annotation or with the target labelled absent.
        ("folder", [*TRUTH, NONE, HERE], [*BOXES, (0, 0, 5, 5), (100, 100, 5, 5)], [0, 0, 0, 0, 0, 1],
         {"auc": 10 / 21, "ao": 0.5, "sr0.5": 1 / 3, "sr0.75": 1 / 3}),
        # The toolkit sets the error of frames without annotation to -1, which is below every threshold.
        ("uav123", [*TRUTH, NONE], [*BOXES, HERE], None,
         {"auc": 10 / 21, "precision": 4 / 5, "norm_precision": 3 / 5}),
        *((protocol, [*TRUTH, (0, 0, 0, 0)], [*BOXES, HERE], [0, 0, 0, 0, 1],
           {"auc": 10 / 21, "precision": 3 / 5, "norm_precision": 2 / 5, "auc_visible": 12.5 / 21})
          for protocol in ("lasot", "lasotext")),
        # Rounded to whole pixels, halves to even. Trapezoids under the shares at 21 points: 0.75 x 10, 0.5 x 10, 0;
        # 0.5 x 2, 0.75 x 10, 1 x 9 (errors 0, 5, 30, 0 at 0, 2.5, ... 50); 0.5 x 10, 0.75 x 11 (0, 0.25, 1.5, 0 boxes).
        ("trackingnet", [(10.2, 10.4, 19.6, 20.4)] * 4, np.add(BOXES, 0.3), None,
         {"success": 24.25 / 40, "precision": 33.5 / 40, "norm_precision": 25.25 / 40}),
        *((protocol, BORDER, BORDER, None, {"sr50": 4 / 5, "precision": 1}) for protocol in ("otb", "uav123", "lasot")),
        *((protocol, BORDER, BORDER, None, {"sr50": 1}) for protocol in ("nfs", "lasotext")),
        ("otb", TRUTH, [(0, 0, 1, 1), NONE, HERE, BROKEN[2]], None, {"sr50": 3 / 4}),  # invalid: as one frame before
        ("otb", TRUTH[:1], BOXES[:1], None, {"sr50": 1}),
        ("folder", TRUTH, BROKEN, None, {"sr50": 1 / 3, "ao": 1 / 3, "precision": 2 / 3}),
        ("trackingnet", TRUTH, BROKEN, None, {"success": 19.5 / 40, "precision": 28.25 / 40}),
        # An error of 20 pixels, which the toolkits' formula rounds to slightly more than 20.
        ("nfs", [FAR] * 2, [FAR, (72.5, *FAR[1:])], None, {"precision": 0.5}),
    ],
)  # fmt: skip
def test_metrics_by_hand(protocol, truth, boxes, absent, expected):
    found = score(protocol, truth, boxes, absent=absent).metrics
    assert {name: found[name] for name in expected} == pytest.approx(expected)


def test_undefined_values_are_left_out_of_averages():
    scores = [score("lasot", TRUTH, BOXES, absent=absent) for absent in ([0] * 4, [1] * 4)]
    assert summarise(PROTOCOLS["lasot"], scores).metrics["auc_visible"] == pytest.approx(12.5 / 21)
    assert speed([np.array([0.0, 0.5])])["frames"] == 1  # an untimed frame does not count


def test_withheld_truth_and_wrong_lengths():
    truth = [(10, 10, 20, 20), (np.nan,) * 4, (np.nan,) * 4]
    for protocol in ("got10k", "trackingnet", "folder", "uav123"):
        assert score(protocol, truth, np.full((3, 4), 10.0)) is None
    with pytest.raises(DatasetError, match="2 visibility labels"):
        sequence(TRUTH, absent=[0, 1])
