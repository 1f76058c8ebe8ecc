"""Protocols with made-up steps, and steps over real engines."""

from __future__ import annotations

import json
import shutil
from dataclasses import asdict
from pathlib import Path
from typing import Any, List, Sequence

import numpy as np
import pytest

from asymtrack_edge.benchmarks.speed import clips, models, peers, protocols, subjects, tracking
from asymtrack_edge.benchmarks.speed.facts import Conditions, collect
from asymtrack_edge.benchmarks.speed.protocols import Bench, Peak
from asymtrack_edge.benchmarks.speed.subjects import EngineStep, Subject, UpdateStep, ping_pong
from asymtrack_edge.benchmarks.speed.timing import Step
from asymtrack_edge.benchmarks.speed.tracking import dropped_frames
from asymtrack_edge.errors import BackendError, SourceError, UsageError
from asymtrack_edge.runtime.backends.loading import open_backend
from asymtrack_edge.runtime.tracker import Tracker
from asymtrack_edge.variants import VARIANTS


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
    return Bench(collect(), None, probe=lambda: Conditions({"CPU": 50.0}, None, None, 0.0))


def subject(name: str, **changes: Any) -> Subject:
    return Subject(name, "AsymTrack-T", "onnxruntime", "graph", **changes)


def test_network_makes_p1_and_p2_of_the_same_calls(bench: Bench) -> None:
    slow, fast = Fixed(0.02), Fixed(0.005)
    peak = Peak(Fixed(0.01), 10**9, 1)
    candidates = [(subject("slow"), slow), (subject("fast", multiply_adds=250_000_000, batch=2), fast)]
    found = protocols.network(bench, candidates, peak=peak)
    assert [(r.protocol, r.subject.name) for r in found.rows] == [
        ("P1", "slow"), ("P2", "slow"), ("P1", "fast"), ("P2", "fast")
    ]  # fmt: skip
    assert found.rows[0].fps == pytest.approx(50) and found.rows[2].fps == pytest.approx(400)
    # 2 x 0.25 G in 5 ms is 100 G/s, as much as the product makes.
    assert found.rows[2].share_of_peak == pytest.approx(1.0)
    assert found.rows[0].share_of_peak is None
    assert found.rows[2].values["G multiply-adds/s"] == pytest.approx(100)
    assert found.values == {"peak rate, 1 threads (G multiply-adds/s)": pytest.approx(100)}
    assert [str(r) for _, r in found.ratios] == ["4.00 (4.00-4.00)"]
    assert found.rows[0].notes == () and found.rows[0].latency is not None
    assert found.rows[0].latency.count >= protocols.CALLS
    assert not slow.bursts


def test_where_calls_queue_p1_is_a_burst_of_as_many_that_waits_once(bench: Bench) -> None:
    step, answering = Fixed(0.01, queues=True), Fixed(0.01)
    pair = [(subject(name, device="cuda:0"), s) for name, s in (("gpu", step), ("answering", answering))]
    rows = protocols.network(bench, pair).rows
    assert step.bursts == [10, rows[0].latency.count] and rows[0].latency.count >= protocols.CALLS  # type: ignore[union-attr]
    assert any("one burst of" in note for note in rows[0].notes) and not rows[1].notes
    assert not answering.bursts and rows[2].fps == pytest.approx(100)
    assert rows[0].fps == pytest.approx(200) and rows[1].latency.median == pytest.approx(10)  # type: ignore[union-attr]


def test_rows_say_when_time_cut_the_protocol_short(bench: Bench) -> None:
    bench.seconds = 1e-6
    rows = protocols.network(bench, [(subject("a"), Fixed(0.01))]).rows
    assert any("stopped by time" in n for n in rows[0].notes)


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


def test_ping_pong_has_no_cut() -> None:
    order = ping_pong(4)
    assert [next(order) for _ in range(9)] == [0, 1, 2, 3, 2, 1, 0, 1, 2]


class Recorder:
    """A tracker that takes its time by the frame's first value."""

    def __init__(self) -> None:
        self.calls: List[str] = []

    def init(self, frame: np.ndarray, box: Sequence[float]) -> None:
        self.calls.append("init")

    def update(self, frame: np.ndarray) -> None:
        self.calls.append("update")


def test_data_set_times_the_init_too_and_reads_lazily(bench: Bench) -> None:
    tracker = Recorder()
    sequences = [((np.zeros((4, 4, 3), np.uint8) for _ in range(n)), (0, 0, 2, 2)) for n in (3, 2)]
    row = tracking.data_set(bench, subject("x"), tracker, sequences)
    assert tracker.calls == ["init", "update", "update", "init", "update"]
    assert row.latency is not None and row.latency.count == 5 and row.values["sequences"] == 2
    # A mean of speeds is never below the speed of the whole (Jensen).
    assert row.values["GOT-10k mean(1/t) (fps)"] >= row.values["frames / total time (fps)"]
    with pytest.raises(SourceError):
        tracking.data_set(bench, subject("x"), tracker, [])


def test_engine_step_books_the_inference_only(exported: Path) -> None:
    engine = open_backend(exported, "onnxruntime", threads=1)
    step = EngineStep(engine, 3)
    before = dict(engine.seconds)
    seconds = step.sample()
    assert seconds == pytest.approx(engine.seconds["infer"] - before["infer"]) and seconds > 0
    assert engine.capacity >= 3
    described = subjects.engine_subject(engine, 0, 1)
    assert described.tracker == "AsymTrack-T" and len(described.model_sha256) == 64
    assert "untrained" in described.notes[0] and described.multiply_adds
    step.close()


def test_update_step_and_p5_stages(exported: Path, bench: Bench) -> None:
    bench.seconds = 0.3
    frames = [f for f, _ in __import__("asymtrack_edge.runtime.sources.clip", fromlist=["x"]).synthetic_clip(4)]
    tracker = Tracker.load(exported, "onnxruntime", threads=1)
    rows = tracking.update(bench, [(subject("x"), UpdateStep(tracker, frames, (150, 110, 50, 40)))]).rows
    stages = rows[0].stages
    assert set(stages) == {"crop", "infer", "decode box"}
    assert sum(stages.values()) == pytest.approx(rows[0].latency.mean, rel=0.5)  # type: ignore[union-attr]
    assert stages["infer"] > stages["decode box"]


def test_end_to_end_from_an_encoded_video(
    exported: Path, bench: Bench, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    bench.seconds = 2.0
    monkeypatch.setattr(clips, "HD", (320, 240))
    clip = clips.synthetic(tmp_path, 6)
    tracker = Tracker.load(exported, "onnxruntime", threads=1)
    row = tracking.end_to_end(bench, subject("x"), tracker, clip.open, clip.box, 8)
    assert row.values["frames"] == 8
    assert next(iter(row.stages)) == "decode" and row.stages["decode"] > 0
    assert sum(row.stages.values()) == pytest.approx(row.latency.mean, rel=0.05)  # type: ignore[union-attr]
    assert 0 <= row.values["dropped at 60 fps (%)"] < 100


def test_onnx_step_makes_inputs_up(exported: Path) -> None:
    step = subjects.onnx_step(str(exported / "template.onnx"), None, 1, ["CPUExecutionProvider"])
    assert step.sample() > 0
    with pytest.raises(BackendError, match="cannot load"):
        subjects.onnx_step(str(exported / "manifest.json"), None, 1, ["CPUExecutionProvider"])
    with pytest.raises(BackendError, match="has no CUDAExecutionProvider"):
        subjects.onnx_step(str(exported / "search.onnx"), None, 1, [("CUDAExecutionProvider", {})])


def test_a_peer_runs_with_the_threads_its_row_says(exported: Path) -> None:
    spec = peers.parse_peer(f"mine={exported}")
    for threads in (1, 2):
        tracker = peers.build_peer(spec, threads)
        assert tracker.tracker.backend.threads == peers.peer_subject(spec, threads).threads == threads


def test_peers_are_recognised_by_their_files(exported: Path, tmp_path: Path) -> None:
    assert peers.parse_peer("opencv:MIL").name == "MIL"
    own = peers.parse_peer(f"mine={exported}")
    assert own.spec is not None and own.spec.name == str(exported)
    pair = tmp_path / "pair"
    pair.mkdir()
    for name in ("nano_backbone.onnx", "nano_head.onnx"):
        (pair / name).write_bytes(name.encode())
    nano = peers.parse_peer(f"nano={pair}")
    assert nano.spec is not None and nano.spec.name.startswith("opencv:nano=") and len(nano.models) == 2
    described = peers.peer_subject(nano, 1, nano.models[0])
    assert described.name == "nano/nano_backbone" and described.backend == "onnxruntime"
    assert peers.peer_subject(nano, 1).backend == "opencv"
    (pair / "nano_head.onnx").unlink()
    vit = peers.parse_peer(f"vit={pair}")
    assert vit.spec is not None and vit.spec.name.startswith("opencv:vit=")
    (pair / "other.onnx").write_bytes(b"x")
    assert peers.parse_peer(f"two={pair}").spec is None
    for wrong in ("mil", "x=", f"x={tmp_path / 'none'}", f"x={tmp_path}"):
        with pytest.raises(UsageError):
            peers.parse_peer(wrong)


@pytest.mark.slow
def test_a_missing_export_is_made_verified_and_marked_untrained(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from asymtrack_edge.manifest import load_manifest
    from tests.helpers import SMALL

    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    manifest = load_manifest(models.export_folder(SMALL, max_batch=2))
    assert manifest.provenance["weights"].startswith("random") and manifest.max_batch == 2
    assert manifest.verification["frames"] == 3


def test_exports_are_kept_by_what_decides_their_graph(
    exported: Path, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from tests.helpers import SMALL

    # Exporting for real is the slow test's business.
    monkeypatch.setattr(models, "_export", lambda *a: Path(shutil.copytree(exported, a[-1])))
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    said: List[str] = []
    first = models.export_folder(SMALL, say=said.append)
    assert models.export_folder(SMALL, say=said.append) == first and len(said) == 1
    assert str(first).startswith(str(tmp_path))
    assert models._key(SMALL, "fp32", 1, "onnx") != models._key(SMALL, "fp32", 2, "onnx")
    assert models._key(SMALL, "fp32", 1, "onnx") != models._key(SMALL.with_(ope_stages=()), "fp32", 1, "onnx")
    assert models.is_ablated(SMALL) and not models.is_ablated(VARIANTS["T"])
    models.clear_cache()
    assert not first.exists()


def test_torch_steps_answer_in_both_forms() -> None:
    from asymtrack_edge.benchmarks.speed.own_process import torch_step
    from tests.helpers import SMALL

    for form in ("reference", "folded"):
        described, step = torch_step(SMALL, form, threads=1)
        assert step.sample() > 0 and described.form == form and len(described.model_sha256) == 64
        assert described.multiply_adds == models.multiply_adds(SMALL)
        before = step.processor_seconds()
        assert len(step.turn(3)) == 3 and step.processor_seconds() > before
        step.close()
    with pytest.raises(UsageError, match="unknown form"):
        torch_step(SMALL, "melted")
    with pytest.raises(UsageError, match="fp32"):
        torch_step(SMALL, "reference", precision="fp16")


def test_a_process_that_dies_is_an_error() -> None:
    from asymtrack_edge.benchmarks.speed.own_process import torch_step
    from tests.helpers import SMALL

    _, step = torch_step(SMALL, "folded", threads=1)
    step._child.kill()  # type: ignore[attr-defined]
    with pytest.raises(BackendError, match="ended with exit code -9"):
        step.sample()
    step.close()


def test_what_goes_wrong_in_the_other_process_is_said(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    from asymtrack_edge.benchmarks.speed.own_process import torch_step
    from tests.helpers import SMALL

    with pytest.raises(BackendError, match="Error"):
        torch_step(SMALL, "folded", threads=1, batch=10**9)
    # A file of the user's that happens to be called like a module is not imported.
    (tmp_path / "cv2.py").write_text("raise SystemExit(5)")
    monkeypatch.chdir(tmp_path)
    _, step = torch_step(SMALL, "folded", threads=1)
    step.close()


def test_variants_survive_the_way_to_another_process() -> None:
    from asymtrack_edge.benchmarks.speed.torch_worker import variant_of

    for variant in (*VARIANTS.values(), VARIANTS["S"].with_(ope_stages=(), etm_stages=(3,))):
        assert variant_of(json.loads(json.dumps(asdict(variant)))) == variant


def test_hardware_that_is_not_there_makes_no_row() -> None:
    torch = pytest.importorskip("torch")
    if torch.cuda.is_available():
        pytest.skip("this machine has a CUDA device")
    from asymtrack_edge.benchmarks.speed.own_process import torch_step

    with pytest.raises(BackendError, match="no CUDA device"):
        torch_step(VARIANTS["T"], "reference", "cuda:0")
