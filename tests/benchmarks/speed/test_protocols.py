"""Protocols with made-up cases, and cases over real backends."""

from __future__ import annotations

import multiprocessing
from dataclasses import replace

import pytest

from asymtrack_edge.benchmarks.speed import cases, protocols
from asymtrack_edge.benchmarks.speed.cases import Setting, network_case
from asymtrack_edge.benchmarks.speed.measure import trtexec_layers
from asymtrack_edge.benchmarks.speed.protocols import CALLS, Bench, dropped_frames
from asymtrack_edge.benchmarks.speed.race import Case
from asymtrack_edge.benchmarks.speed.report import Report
from asymtrack_edge.benchmarks.speed.torch_process import reference_case
from asymtrack_edge.errors import BackendError, ManifestError, UsageError
from asymtrack_edge.variants import VARIANTS
from tests.helpers import SMALL


def fixed(name, seconds, **more):
    """A case that claims the same time for every call."""
    return Case(name, lambda: seconds, **more)


@pytest.fixture
def bench():
    return Bench(Report("test"))


def test_throughput_and_latency_of_the_same_calls(bench):
    slow, peak = fixed("slow", 0.02), fixed("peak", 0.01, multiply_adds=10**9)
    fast = fixed("fast", 0.005, multiply_adds=250_000_000, batch=2)
    half = fixed("half", 0.005, multiply_adds=250_000_000, device="cuda:0")
    protocols.networks(bench, [slow, fast, half], None, peak)
    rows = bench.report.rows
    assert [(r["protocol"], r["case"]["name"]) for r in rows] == [("P1, P2", n) for n in ("slow", "fast", "half")]
    assert rows[0]["fps"] == pytest.approx(50) and rows[1]["fps"] == pytest.approx(400)
    # 2 x 0.25 G in 5 ms is 100 G/s, as much as the product makes.
    assert rows[1]["values"] == {"G multiply-adds/s": pytest.approx(100), "of peak %": pytest.approx(100)}
    assert rows[0]["values"] == {} and "of peak %" not in rows[2]["values"]
    ratios = [(r["protocol"], r["name"], r["speedup"]) for r in bench.report.ratios]
    assert ratios == [("P2", "fast", pytest.approx(4)), ("P2", "half", pytest.approx(4))]
    assert rows[0]["notes"] == [] and rows[0]["latency"]["count"] >= CALLS
    assert rows[0]["machine"]["cores"] >= 1 and rows[0]["before"].keys() == rows[0]["after"].keys()


def test_where_calls_queue_the_throughput_is_a_burst_that_waits_once(bench):
    asked = []

    def elsewhere(times, calls):
        asked.append((times, calls))
        return [0.01] * times if calls == 1 else [0.005 * calls]  # a device works while the host goes on

    protocols.networks(bench, [fixed("gpu", 0.01, elsewhere=elsewhere, device="cuda:0")], None)
    (gpu,) = bench.report.rows
    assert asked[-2:] == [(1, 10), (1, gpu["latency"]["count"])]
    assert gpu["fps"] == pytest.approx(200) and gpu["latency"]["median"] == pytest.approx(10)
    assert "one burst of" in gpu["notes"][0]


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


def test_settings_are_named_by_what_differs():
    assert list(cases.settings(["T"])) == ["T"]
    assert list(cases.settings(["T", "T"])) == ["T", "T again"]
    both = cases.settings(["T", "B"], ("openvino",), ("fp32", "bf16"), (1,), "cpu")
    assert list(both) == ["T, fp32", "T, bf16", "B, fp32", "B, bf16"]
    assert both["B, bf16"] == Setting("B", "openvino", "bf16", "cpu", 1)


def test_a_network_case_books_the_inference_only(exported, monkeypatch):
    backend = cases.open_backend(str(exported), "onnxruntime", threads=1)
    monkeypatch.setattr(cases, "open_backend", lambda **how: backend)
    case = network_case("x", Setting(str(exported)), targets=3)
    before = backend.seconds["infer"]
    seconds = case.sample()
    assert seconds == pytest.approx(backend.seconds["infer"] - before) and seconds > 0
    assert case.tracker == "AsymTrack-T" and len(case.model_sha256) == 64 and case.multiply_adds and case.batch == 3
    assert "untrained" in case.notes[0]
    case.close()


def test_any_onnx_file_runs_on_inputs_that_are_made_up(exported):
    case = network_case("x", Setting(str(exported / "template.onnx"), threads=1))
    assert case.sample() > 0 and "P3" in case.notes[0]
    with pytest.raises(UsageError, match="run as it is"):
        network_case("x", Setting("any.onnx", "openvino"))
    with pytest.raises(ManifestError, match="no ONNX file"):
        network_case("x", Setting("absent.onnx"))
    assert 1e-6 < cases.peak_case(1).sample() < 10


def test_updates_and_the_way_from_an_encoded_video(exported, bench, tmp_path, monkeypatch):
    monkeypatch.setattr(cases, "HD", (320, 240))
    clip = cases.make_clip(None, None, tmp_path)
    ours = cases.tracker_case("x", Setting(str(exported), "onnxruntime", threads=1), clip)
    peer = cases.peer_case("opencv:MIL", 1, clip)
    protocols.update(bench, [ours, peer], 0.6)
    protocols.end_to_end(bench, ours, clip, 0.3, 8)
    whole, other, video = bench.report.rows
    assert set(whole["stages"]) == {"crop", "infer", "decode box"} and not other["stages"]
    assert sum(whole["stages"].values()) == pytest.approx(whole["latency"]["mean"], rel=0.5)
    assert (peer.backend, peer.template, peer.threads) == ("opencv", "its own", 1)
    assert video["values"]["frames"] == 8 and 0 <= video["values"]["dropped at 60 fps (%)"] < 100
    assert next(iter(video["stages"])) == "decode" and video["stages"]["decode"] > 0
    assert sum(video["stages"].values()) == pytest.approx(video["latency"]["mean"], rel=0.05)
    ours.close()


def test_layers_of_trtexec(tmp_path):
    file = tmp_path / "profile.json"
    file.write_text(
        '[{"count": 900}, {"name": "/stem/Conv", "timeMs": 90, "averageMs": 0.1, "medianMs": 0.09, "percentage": 40},'
        ' {"name": "{ForeignNode[a...b]}", "timeMs": 100, "averageMs": 0.2, "percentage": 60}]'
    )
    found = [(layer["operator"], layer["milliseconds"]) for layer in trtexec_layers(file)]
    assert found == [("Conv", 0.09), ("fused (Myelin)", 0.2)]
    file.write_text("{}[")
    with pytest.raises(UsageError, match="exportProfile"):
        trtexec_layers(file)


def test_the_reference_form_is_timed_in_another_process():
    case = reference_case(SMALL, threads=1)
    assert case.backend == "torch" and len(case.model_sha256) == 64 and "untrained" in case.notes[0]
    assert case.sample() > 0 and len(case.turn(3)) == 3 and case.elsewhere(1, 2)[0] > 0
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(BackendError, match="has died"):
        case.sample()
    case.close()


def test_what_goes_wrong_in_the_other_process_is_said():
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="Error"):
        reference_case(replace(SMALL, widths=(32, 64)))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            reference_case(VARIANTS["T"], "cuda:0")
