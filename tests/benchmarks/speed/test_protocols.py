"""Protocols with made-up cases, and the process that times PyTorch."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest

from asymtrack_edge.benchmarks.speed import cases, measure
from asymtrack_edge.benchmarks.speed.cases import reference_case
from asymtrack_edge.benchmarks.speed.command import make_parser
from asymtrack_edge.benchmarks.speed.measure import CALLS, dropped_frames
from asymtrack_edge.benchmarks.speed.race import Case
from asymtrack_edge.benchmarks.speed.report import Bench, Report
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.errors import BackendError
from asymtrack_edge.variants import VARIANTS
from tests.helpers import SMALL


def test_throughput_and_latency_of_the_same_calls():
    """A device that works while the host goes on is asked for a burst that waits once."""

    def fixed(name, seconds, **more):
        return Case(name, lambda calls: [seconds] * calls, **more)

    bench = Bench(Report("test"))
    queued = fixed("queued", 0.01, burst=lambda calls: 0.005 * calls, device="cuda:0")
    measure.networks(bench, [fixed("slow", 0.02), fixed("fast", 0.005, batch=2), queued], None)
    rows = bench.report.rows
    assert [(r["protocol"], r["case"]["name"]) for r in rows] == [("P1, P2", n) for n in ("slow", "fast", "queued")]
    assert [r["fps"] for r in rows] == pytest.approx([50, 400, 200])
    assert [r["latency"]["median"] for r in rows] == pytest.approx([20, 5, 10])
    assert [(r["name"], r["speedup"]) for r in bench.report.ratios] == [("fast", 4), ("queued", 2)]
    assert rows[0]["notes"] == [] and rows[0]["latency"]["count"] >= CALLS
    assert "one burst of" in rows[2]["notes"][0]


@pytest.mark.parametrize(
    ("seconds", "fps", "lost"),
    [
        ([0.01] * 30, 30, 0),  # faster than the camera
        ([0.05] * 4, 30, 2),  # 1.5 frames each: 0, 1, 3, 4 -> one of two is followed by a gap
        ([0.1] * 10, 30, 20),  # three frames each: two lost each time
        ([1 / 30] * 100, 30, 0),  # exactly as fast
    ],
)
def test_dropped_frames(seconds, fps, lost):
    assert dropped_frames(seconds, fps) == lost


def test_combinations_are_named_by_what_differs():
    def combinations(*arguments):
        return cases.combinations(make_parser().parse_args(["speed", *arguments]))

    assert list(combinations("T")) == ["T"] and list(combinations("T", "T")) == ["T", "T again"]
    options = ("--backend", "openvino", "--precision", "fp32,bf16", "--threads", "1", "--device", "cpu")
    both = combinations("T", "B", *options)
    assert list(both) == ["T, fp32", "T, bf16", "B, fp32", "B, bf16"]
    assert both["B, bf16"] == TrackerSpec("B", "openvino", "cpu", 1, "bf16")


def test_the_reference_form_is_timed_in_another_process():
    case = reference_case(SMALL, threads=1)
    assert case.backend == "torch" and "untrained" in case.notes[0]
    assert len(case.run(3)) == 3 and min(case.run(3)) > 0
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(BackendError, match="process died"):
        case.run(1)
    case.close()


def test_what_goes_wrong_in_the_other_process_is_said():
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="Error"):
        reference_case(replace(SMALL, widths=(32, 64)))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            reference_case(VARIANTS["T"], "cuda:0")
