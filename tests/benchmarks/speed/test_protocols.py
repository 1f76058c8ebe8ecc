"""Protocols with made-up steps, and steps over real backends."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, List, Sequence

import pytest

from asymtrack_edge.benchmarks.speed import cases, layers, protocols
from asymtrack_edge.benchmarks.speed.cases import Setting, UpdateStep, network_case
from asymtrack_edge.benchmarks.speed.protocols import CALLS, Bench, dropped_frames
from asymtrack_edge.benchmarks.speed.race import Case, Step
from asymtrack_edge.benchmarks.speed.report import Report
from asymtrack_edge.benchmarks.speed.torch_process import reference_case
from asymtrack_edge.errors import BackendError, ManifestError, UsageError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from asymtrack_edge.variants import VARIANTS
from tests.helpers import SMALL

#: In the format of trtexec 8.5; values made up.
TRTEXEC = """&&&& RUNNING TensorRT.trtexec [TensorRT v8502] # trtexec --loadEngine=search.engine
[07/20/2023-10:02:11] [I] === Performance summary ===
[07/20/2023-10:02:11] [I] Throughput: 312.345 qps
[07/20/2023-10:02:11] [I] Latency: min = 3.11 ms, max = 3.95 ms, mean = 3.25 ms, median = 3.24 ms, percentile(90%) = 3.3 ms, percentile(95%) = 3.4 ms, percentile(99%) = 3.6 ms
[07/20/2023-10:02:11] [I] Enqueue Time: min = 1.1 ms, max = 1.9 ms, mean = 1.2 ms, median = 1.21 ms, percentile(90%) = 1.3 ms, percentile(95%) = 1.4 ms, percentile(99%) = 1.6 ms
[07/20/2023-10:02:11] [I] H2D Latency: min = 0.05 ms, max = 0.09 ms, mean = 0.06 ms, median = 0.055 ms, percentile(99%) = 0.08 ms
[07/20/2023-10:02:11] [I] GPU Compute Time: min = 3.0 ms, max = 3.8 ms, mean = 3.1 ms, median = 3.12 ms, percentile(90%) = 3.2 ms, percentile(95%) = 3.3 ms, percentile(99%) = 3.5 ms
[07/20/2023-10:02:11] [I] D2H Latency: min = 0.002 ms, max = 0.01 ms, mean = 0.004 ms, median = 0.0041 ms, percentile(99%) = 0.009 ms
[07/20/2023-10:02:11] [I] Total Host Walltime: 3.00452 s
"""  # noqa: E501


class Fixed(Step):
    """Claims the same time for every call."""

    def __init__(self, seconds: float, queues: bool = False) -> None:
        self.seconds = seconds
        self.queues = queues
        self.bursts: List[int] = []

    def sample(self) -> float:
        return self.seconds

    def burst(self, calls: int) -> float:
        self.bursts.append(calls)
        return 0.5 * self.seconds * calls  # a device works while the host goes on


@pytest.fixture()
def bench() -> Bench:
    return Bench(Report("test"), None)


def test_throughput_and_latency_of_the_same_calls(bench: Bench) -> None:
    slow, peak = Case("slow", Fixed(0.02)), Case("peak", Fixed(0.01), multiply_adds=10**9, threads=1)
    fast = Case("fast", Fixed(0.005), multiply_adds=250_000_000, batch=2)
    protocols.networks(bench, [slow, fast], peak)
    rows = bench.report.rows
    assert [(r["protocol"], r["case"]["name"]) for r in rows] == [("P1, P2", "slow"), ("P1, P2", "fast")]
    assert rows[0]["fps"] == pytest.approx(50) and rows[1]["fps"] == pytest.approx(400)
    # 2 x 0.25 G in 5 ms is 100 G/s, as much as the product makes.
    assert rows[1]["share_of_peak"] == pytest.approx(1.0) and rows[0]["share_of_peak"] is None
    assert rows[1]["values"]["G multiply-adds/s"] == pytest.approx(100)
    assert bench.report.values == {"peak rate, 1 threads (G multiply-adds/s)": pytest.approx(100)}
    assert [(r["name"], r["speedup"]) for r in bench.report.ratios] == [("fast", pytest.approx(4))]
    assert rows[0]["notes"] == [] and rows[0]["latency"]["count"] >= CALLS
    assert rows[0]["machine"]["cores"] >= 1 and rows[0]["before"].keys() == rows[0]["after"].keys()


def test_where_calls_queue_the_throughput_is_a_burst_that_waits_once(bench: Bench) -> None:
    step, answering = Fixed(0.01, queues=True), Fixed(0.01)
    protocols.networks(bench, [Case("gpu", step, device="cuda:0"), Case("other", answering, device="cuda:0")])
    gpu, other = bench.report.rows
    assert step.bursts == [10, gpu["latency"]["count"]] and not answering.bursts
    assert gpu["fps"] == pytest.approx(200) and gpu["latency"]["median"] == pytest.approx(10)
    assert "one burst of" in gpu["notes"][0] and other["fps"] == pytest.approx(100)


def test_rows_say_when_time_cut_the_protocol_short(bench: Bench) -> None:
    bench.seconds = 1e-6
    protocols.networks(bench, [Case("a", Fixed(0.01))])
    assert "stopped by time" in bench.report.rows[0]["notes"][0]


@pytest.mark.parametrize(
    ("seconds", "fps", "lost"),
    [
        ([0.01] * 30, 30, 0),  # faster than the camera
        ([0.05] * 4, 30, 2),  # 1.5 frames each: 0, 1, 3, 4 -> one of two is followed by a gap
        ([0.1] * 10, 30, 20),  # three frames each: two lost each time
        ([1 / 30] * 100, 30, 0),  # exactly as fast
    ],
)
def test_dropped_frames(seconds: Sequence[float], fps: float, lost: int) -> None:
    assert dropped_frames(seconds, fps) == lost


def test_settings_are_named_by_what_differs() -> None:
    assert list(cases.settings(["T"])) == ["T"]
    assert list(cases.settings(["T", "T"])) == ["T", "T again"]
    both = cases.settings(["T", "B"], ("openvino",), ("fp32", "bf16"), (1,), "cpu")
    assert list(both) == ["T, fp32", "T, bf16", "B, fp32", "B, bf16"]
    assert both["B, bf16"] == Setting("B", "openvino", "bf16", "cpu", 1)


def test_a_network_step_books_the_inference_only(exported: Path) -> None:
    case = network_case("x", Setting(str(exported), "onnxruntime", threads=1), targets=3)
    backend = case.step.backend  # type: ignore[attr-defined]
    before = dict(backend.seconds)
    seconds = case.step.sample()
    assert seconds == pytest.approx(backend.seconds["infer"] - before["infer"]) and seconds > 0
    assert backend.capacity >= 3 and case.batch == 3
    assert case.tracker == "AsymTrack-T" and len(case.model_sha256) == 64 and case.multiply_adds
    assert "untrained" in case.notes[0]
    case.step.close()


def test_any_onnx_file_runs_on_inputs_that_are_made_up(exported: Path) -> None:
    case = network_case("x", Setting(str(exported / "template.onnx"), threads=1))
    assert case.step.sample() > 0 and "P3" in case.notes[0]
    with pytest.raises(UsageError, match="run as it is"):
        network_case("x", Setting("any.onnx", "openvino"))
    with pytest.raises(ManifestError, match="no ONNX file"):
        network_case("x", Setting("absent.onnx"))
    assert 1e-6 < cases.peak_case(1).step.sample() < 10


def test_updates_and_the_way_from_an_encoded_video(
    exported: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.seconds = 0.6
    monkeypatch.setattr(cases, "HD", (320, 240))
    clip = cases.make_clip(None, None, tmp_path)
    case = cases.tracker_case("x", Setting(str(exported), "onnxruntime", threads=1), clip)
    protocols.update(bench, [case])
    protocols.end_to_end(bench, case, clip, 8)
    whole, video = bench.report.rows
    assert set(whole["stages"]) == {"crop", "infer", "decode box"}
    assert sum(whole["stages"].values()) == pytest.approx(whole["latency"]["mean"], rel=0.5)
    assert video["values"]["frames"] == 8 and 0 <= video["values"]["dropped at 60 fps (%)"] < 100
    assert next(iter(video["stages"])) == "decode" and video["stages"]["decode"] > 0
    assert sum(video["stages"].values()) == pytest.approx(video["latency"]["mean"], rel=0.05)
    case.step.close()


def test_a_peer_is_tracked_on_the_same_frames(bench: Bench) -> None:
    pairs = list(synthetic_clip(3, (160, 120)))
    clip = cases.Clip("c", [f for f, _ in pairs], pairs[0][1], lambda: None)  # type: ignore[arg-type, return-value]
    case = cases.peer_case("opencv:MIL", 1, clip)
    assert isinstance(case.step, UpdateStep) and case.step.sample() > 0
    assert (case.backend, case.template, case.threads) == ("opencv", "its own", 1)
    with pytest.raises(UsageError, match="unknown tracker"):
        cases.peer_case("opencv:nobody", 1, clip)


def test_trtexec(exported: Path, bench: Bench, monkeypatch: pytest.MonkeyPatch) -> None:
    manifest = replace(load_manifest(exported), engines={"search.engine": {}})  # type: ignore[dict-item]
    case = Case("x", Fixed(0.01), backend="tensorrt", device="cuda:0")
    commands: List[Any] = []

    def run(command: Any) -> str:
        commands.append(command)
        return TRTEXEC

    monkeypatch.setattr(protocols, "find_trtexec", lambda: None)
    protocols.trtexec(bench, case, exported, manifest, run)
    assert bench.report.messages == ["P4 was left out: trtexec is not installed"] and not commands
    monkeypatch.setattr(protocols, "find_trtexec", lambda: "trtexec")
    protocols.trtexec(bench, case, exported, manifest, run)
    row = bench.report.rows[0]
    assert row["fps"] == 312.345 and row["stages"] == {"copy in": 0.055, "infer": 3.12, "copy out": 0.0041}
    assert row["values"]["Enqueue Time median (ms)"] == 1.21
    assert commands[0][1] == f"--loadEngine={exported / 'search.engine'}"
    assert commands[0][-1].startswith("--shapes=image:1x96x96x3,")
    with pytest.raises(BackendError, match="Engine could not be deserialized"):
        protocols.parse_trtexec("[E] Engine could not be deserialized\n&&&& FAILED")


def test_layers_of_trtexec(tmp_path: Path) -> None:
    file = tmp_path / "profile.json"
    file.write_text(
        '[{"count": 900}, {"name": "/stem/Conv", "timeMs": 90, "averageMs": 0.1, "medianMs": 0.09, "percentage": 40},'
        ' {"name": "{ForeignNode[a...b]}", "timeMs": 100, "averageMs": 0.2, "percentage": 60}]'
    )
    found = [(layer["operator"], layer["milliseconds"]) for layer in layers.trtexec_layers(file)]
    assert found == [("Conv", 0.09), ("fused (Myelin)", 0.2)]
    file.write_text("{}[")
    with pytest.raises(UsageError, match="exportProfile"):
        layers.trtexec_layers(file)


def test_the_reference_form_is_timed_in_another_process() -> None:
    case = reference_case(SMALL, threads=1)
    assert case.backend == "torch" and len(case.model_sha256) == 64 and "untrained" in case.notes[0]
    assert case.step.sample() > 0
    before = case.step.processor_seconds()
    assert len(case.step.turn(3)) == 3 and case.step.processor_seconds() > before
    assert case.step.burst(2) > 0
    case.step._child.kill()  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="ended with exit code -9"):
        case.step.sample()
    case.step.close()


def test_what_goes_wrong_in_the_other_process_is_said() -> None:
    torch = pytest.importorskip("torch")
    with pytest.raises(BackendError, match="Error"):
        reference_case(SMALL.with_(widths=(32, 64)))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            reference_case(VARIANTS["T"], "cuda:0")
