"""asymtrack-bench: mistakes in one line, small real runs, reports in JSON and Markdown."""

from __future__ import annotations

import json
import multiprocessing
import re
from dataclasses import replace
from unittest.mock import MagicMock

import numpy as np
import pytest

from asymtrack_edge.benchmarks import paper
from asymtrack_edge.benchmarks.speed import cases, energy, measure
from asymtrack_edge.benchmarks.speed.command import main, make_parser
from asymtrack_edge.benchmarks.speed.race import Case
from asymtrack_edge.benchmarks.speed.report import Bench, Report
from asymtrack_edge.benchmarks.trackers import TrackerSpec
from asymtrack_edge.errors import BackendError
from asymtrack_edge.manifest import load_manifest
from asymtrack_edge.runtime.sources.clip import synthetic_clip
from asymtrack_edge.variants import VARIANTS
from tests.datasets.miniature import write_images
from tests.helpers import SMALL, export_small, refusal


@pytest.fixture(scope="module")
def exported(tmp_path_factory):
    """An export of ``SMALL`` with made-up weights, for batches of up to 4."""
    folder = export_small(tmp_path_factory.mktemp("exported"), max_batch=4)
    manifest = load_manifest(folder)
    replace(manifest, provenance={**manifest.provenance, "weights": "random, seed 0"}).save(folder)
    return folder


MISTAKES = [
    (["speed", "T", "--protocol", "P9"], "unknown protocol 'P9'"),
    (["speed", "T", "--protocol", "P1", "--tracker", "opencv:MIL"], "add P5"),
    (["speed", "T", "--protocol", "P1,P5", "--tracker", "opencv:KFC"], "unknown tracker"),
    (["speed", "T", "--seconds", "-1"], "not a number above 0, at most 1e9"),
    (["speed", "T", "--clip", "x.mp4"], "go together"),
    (["speed", "/no/such/folder", "--protocol", "P1"], "there is no model"),
    (["ab", "T"], "needs two cases"),
    (["targets", "T", "--counts", "0,2"], "not a whole number from 1"),
    (["startup", "T", "--runs", "1", "--backend", "onnxruntime-tensorrt"], "Tensorrt"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_end_in_one_line(arguments, words, capsys):
    assert words in refusal(main, arguments, capsys)


def run(capsys, *arguments, code=0):
    assert main([*map(str, arguments), "--json"]) == code
    return json.loads(capsys.readouterr().out)


def test_a_small_speed_run(exported, tmp_path, capsys):
    write_images(tmp_path, (frame for frame, _ in synthetic_clip(9, (160, 120))))
    document = run(
        capsys, "speed", exported, "--backend", "onnxruntime", "--threads", "1", "--seconds", "0.6",
        "--clip", tmp_path, "--box", "60,40,40,30", "--tracker", "opencv:MIL", "--output", tmp_path / "report",
    )  # fmt: skip
    name = f"{exported}, onnxruntime"
    network, ours, peer, video = document["rows"]
    seen = [(r["protocol"], r["case"]["name"]) for r in document["rows"]]
    assert seen == [("P1, P2", name), ("P5", name), ("P5", "opencv:MIL"), ("P6", name)]
    assert all(r["machine"]["cpu"] and r["latency"]["median"] > 0 for r in document["rows"])
    assert document["paper"][0]["published"] == 81 and len(network["case"]["model_sha256"]) == 64
    assert any("the time limit ended it" in note for note in network["notes"])
    assert ours["fps"] == pytest.approx(1000 / ours["latency"]["median"])
    assert set(ours["stages"]) == {"crop", "infer", "box"} and not peer["stages"]
    assert 0.5 < sum(ours["stages"].values()) / ours["latency"]["mean"] <= 1
    assert video["latency"]["count"] == 8 and 0 <= video["values"]["% dropped at 60 fps"] < 100
    assert sum(video["stages"].values()) == pytest.approx(video["latency"]["mean"], rel=0.05)
    assert [(r["protocol"], r["name"]) for r in document["ratios"]] == [("P5", "opencv:MIL")]
    assert json.loads((tmp_path / "report" / "report.json").read_text()) == document


def test_a_model_against_itself_and_the_reference_form(exported, capsys):
    document = run(capsys, "ab", exported, exported, "--threads", "1", "--seconds", "2", "--reference")
    assert [r["base"] for r in document["ratios"]] == ["reference form, PyTorch"] * 2
    # The reference form is that of the full T, because the small model's manifest says that it is a T.
    assert all(r["low"] <= r["speedup"] <= r["high"] and r["speedup"] > 1 for r in document["ratios"])


def test_cases_that_cannot_run_are_left_out_and_named(exported, capsys):
    backends = "onnxruntime,onnxruntime-tensorrt"
    document = run(capsys, "ab", exported, "--backend", backends, "--threads", "1", "--seconds", "0.2", code=1)
    assert [r["case"]["name"] for r in document["rows"]] == ["onnxruntime"]
    assert any(m.startswith("onnxruntime-tensorrt was left out: ") for m in document["messages"])
    exclude = ("--backend", "onnxruntime", "--precision", "fp32,bf16", "--threads", "1", "--seconds", "0.1")
    for command, code in ((("speed", exported, "--protocol", "P1"), 0), (("ab", exported), 1)):
        assert len(run(capsys, *command, *exclude, code=code)["rows"]) == 1


def test_an_error_keeps_what_was_measured_before(exported, tmp_path, capsys, monkeypatch):
    monkeypatch.setattr(measure, "updates", MagicMock(side_effect=BackendError("late at triton://me:secret@host")))
    (tmp_path / "report.json").mkdir()
    document = run(capsys, "speed", exported, "--threads", "1", "--seconds", "0.2", "--output", tmp_path, code=2)
    assert [row["protocol"] for row in document["rows"]] == ["P1, P2"]
    assert "incomplete: late at triton://host/***" in document["messages"]


def test_startup_in_a_fresh_process(exported, capsys):
    (row,) = run(capsys, "startup", exported, "--runs", "1", "--threads", "1")["rows"]
    assert [*row].index("after") < [*row].index("machine")  # the clock was read before the machine rested
    assert row["values"]["load (s)"] > 0 and row["values"]["peak RSS (MB)"] > 30


def test_energy_by_rail(exported, capsys, monkeypatch):
    monkeypatch.setattr(cases, "HD", (320, 240))
    monkeypatch.setattr(energy, "find_sensors", lambda gpu: {"test": lambda: {"VDD_IN": 2000.0}})
    monkeypatch.setattr(energy, "IDLE_SECONDS", 0.4)
    paced, flat = run(capsys, "energy", exported, "--seconds", "0.5", "--threads", "1")["rows"]
    assert paced["case"]["name"].endswith(", 30 fps") and flat["case"]["name"].endswith(", full speed")
    assert flat["values"]["VDD_IN (J/frame)"] == pytest.approx(2 / flat["fps"])


def test_the_paper_measured_and_published(exported, capsys, monkeypatch):
    def reference_case(variant, device, threads, name):
        case = cases.network_case(name, TrackerSpec(str(exported), "onnxruntime", device, threads))
        return replace(case, tracker=f"AsymTrack-{variant.name}")

    monkeypatch.setattr(cases, "reference_case", reference_case)
    document = run(capsys, "paper", "--seconds", "0.2", "--threads", "1", "--device", "cpu")
    assert [(line["table"], line["name"]) for line in document["paper"]] == [
        *(("1, 2", name) for name in "TSB"),
        *(("1, 2", f"{name}, reference form, PyTorch") for name in "TSB"),
        *(("4", f"Table 4, {label}") for label in ("1: neither", "2: ETM", "3: OPE", "4: ETM + OPE")),
    ]
    first, fourth = document["paper"][0], document["paper"][6:]
    assert first["ratio"] == pytest.approx(document["rows"][0]["fps"] / 81) and not first["same_machine"]
    assert [line["published"] for line in fourth] == pytest.approx([95 / 75, 80 / 75, 86 / 75, 1])
    assert [line["measured"] for line in fourth][-1] == 1 and list(paper.speeds(4)) == list(paper.TABLE_4)
    assert main(["paper", "--published"]) == 0
    text = capsys.readouterr().out
    assert "AsymTrack-B" in text and "MixFormer-L" in text and "Table 5b" in text


def test_the_page_of_several_targets(exported, tmp_path, capsys):
    counts = ("--counts", "1,3", "--seconds", 1, "--threads", 1, "--output", tmp_path)
    rows = run(capsys, "targets", exported, *counts)["rows"]
    assert [r["case"]["batch"] for r in rows] == [1, 1, 3, 3]
    assert all(r["values"]["ms per target"] * r["case"]["batch"] == pytest.approx(r["latency"]["median"]) for r in rows)
    assert min(r["latency"]["min"] for r in rows[2:]) > 1.3 * rows[0]["latency"]["min"]  # not changed by other programs
    page = (tmp_path / "report.md").read_text()
    for words in ("- machine: ", f"numpy {np.__version__}", "## Speedups", "P1, P2: search", "one by one (1",
                  "ms per target", "untrained", "## Conditions"):  # fmt: skip
        assert words in page, words
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        assert len({(len(line), line.count("|")) for line in table.splitlines()}) == 1, table


def test_combinations_are_named_by_the_parts_that_differ():
    def combinations(*arguments):
        return cases.combinations(make_parser().parse_args(["speed", *arguments]))

    assert list(combinations("T")) == ["T"] and list(combinations("T", "T")) == ["T", "T again"]
    options = ("--backend", "openvino", "--precision", "fp32,bf16", "--threads", "1", "--device", "cpu")
    both = combinations("T", "B", *options)
    assert list(both) == ["T, fp32", "T, bf16", "B, fp32", "B, bf16"]
    assert both["B, bf16"] == TrackerSpec("B", "openvino", "cpu", 1, "bf16")


def test_throughput_and_latency_of_the_same_calls():
    """On an asynchronous device, the throughput comes from a burst of calls with one wait."""

    def fixed(name, seconds, **more):
        return Case(name, lambda calls: [seconds] * calls, **more)

    bench = Bench(Report("test"))
    queued = fixed("queued", 0.01, burst=lambda calls: 0.005 * calls, device="cuda:0")
    measure.networks(bench, [fixed("slow", 0.02), fixed("fast", 0.005, batch=2), queued], None)
    rows = bench.report.rows
    assert [r["fps"] for r in rows] == pytest.approx([50, 400, 200])
    assert [r["latency"]["median"] for r in rows] == pytest.approx([20, 5, 10])
    assert [(r["name"], r["speedup"]) for r in bench.report.ratios] == [("fast", 4), ("queued", 2)]
    assert rows[0]["notes"] == [] and rows[0]["latency"]["count"] >= measure.CALLS
    assert "one burst of" in rows[2]["notes"][0]
    bench.report.ratios[0]["warning"] = "few"
    assert "> warning: P2 of fast: few" in bench.report.markdown()
    assert [measure.dropped_frames(s, 30) for s in ([0.01] * 30, [0.05] * 4, [0.1] * 10)] == [0, 2, 20]


def test_the_reference_form_is_timed_in_another_process_whose_errors_are_reported():
    torch = pytest.importorskip("torch")
    case = cases.reference_case(SMALL, threads=1)
    assert case.backend == "torch" and "untrained" in case.notes[0]
    assert len(case.run(3)) == 3 and min(case.run(3)) > 0
    for child in multiprocessing.active_children():
        child.kill()
    with pytest.raises(BackendError, match="process died"):
        case.run(1)
    case.close()
    with pytest.raises(BackendError, match="Error"):
        cases.reference_case(replace(SMALL, widths=(32, 64)))
    if not torch.cuda.is_available():
        with pytest.raises(BackendError, match="no CUDA device"):
            cases.reference_case(VARIANTS["T"], "cuda:0")


@pytest.mark.parametrize(
    ("cpu", "gpu", "board", "device", "expected"),
    [
        ("Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz", None, None, "cpu", ("cpu", True)),
        ("AMD EPYC", "NVIDIA GeForce RTX 2080 Ti", None, "cuda:0", ("gpu", True)),
        ("AMD EPYC", "NVIDIA GeForce RTX 4090", None, "cuda:0", ("gpu", False)),
        (None, "Xavier", "Jetson-AGX", "cuda:0", ("agx", True)),
        (None, "Xavier", "Jetson-AGX", "cpu", ("agx", False)),
        (None, "Orin", "NVIDIA Jetson AGX Orin Developer Kit", "cuda:0", ("agx", False)),
        (None, "Orin", "NVIDIA Orin NX Developer Kit", "cuda:0", ("agx", False)),
    ],
)
def test_the_column_to_compare_with(cpu, gpu, board, device, expected):
    assert paper.column_for({"cpu": cpu, "gpu": gpu, "board": board, "l4t": board and "R35"}, device) == expected
