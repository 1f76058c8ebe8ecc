"""The command: mistakes in one line, and small real runs."""

from __future__ import annotations

import json
import subprocess
import sys
from pathlib import Path
from typing import Any, List

import pytest

from asymtrack_edge.benchmarks.speed.command import main
from asymtrack_edge.benchmarks.speed.report import Report
from asymtrack_edge.files import write_image
from asymtrack_edge.runtime.sources.clip import synthetic_clip

MISTAKES = [
    (["speed", "T", "--protocol", "P9"], "there is no 'P9'"),
    (["speed", "T", "--threads", "2,0"], "no whole number above 0"),
    (["speed", "T", "--seconds", "-1"], "no number above 0"),
    (["speed", "T", "--clip", "x.mp4"], "go together"),
    (["speed", "T", "--peer", "nobody:x", "--protocol", "P5", "--seconds", "0.1"], "nobody"),
    (["speed", "/no/such/folder"], "there is no model"),
    (["ab", "T"], "needs two"),
    (["ab", "absent.onnx", "--reference"], "no ONNX file"),
    (["ab", "T", "absent.onnx"], "no ONNX file"),
    (["targets", "T", "--counts", "0,2"], "no whole number above 0"),
    (["targets", "T", "--counts", "65"], "more than 64"),
    (["profile", "T", "--trtexec", "/no/such/file"], "cannot read"),
    (["startup", "T", "--runs", "0"], "no whole number above 0"),
    (["startup", "T", "--runs", "1", "--backend", "onnxruntime-tensorrt"], "Tensorrt"),
    (["report", "/no/such/file"], "cannot read"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_end_in_one_line(arguments: List[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    try:
        code: Any = main(arguments)
    except SystemExit as ended:
        code = ended.code
    assert code == 2
    lines = capsys.readouterr().err.splitlines()
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_energy_needs_a_sensor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from asymtrack_edge.benchmarks.speed import energy

    monkeypatch.setattr(energy, "gpu_milliwatts", lambda gpu: {})
    monkeypatch.setattr(energy.Ina3221, "__init__", lambda self: setattr(self, "rails", {}))
    monkeypatch.setattr(energy.Rapl, "__init__", lambda self: setattr(self, "files", {}))
    assert main(["energy", "T"]) == 2
    assert "no power sensor" in capsys.readouterr().err


def test_help_is_quick_and_has_examples() -> None:
    code = "import sys; from asymtrack_edge.benchmarks.speed.command import make_parser; print(make_parser().epilog); "
    code += "assert not {'torch', 'onnxruntime', 'matplotlib'} & set(sys.modules)"
    text = subprocess.run([sys.executable, "-c", code], stdout=subprocess.PIPE, check=True).stdout.decode()
    assert "asymtrack-bench ab T --reference" in text


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    return json.loads(capsys.readouterr().out)


def test_a_small_speed_run(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    for i, (frame, _) in enumerate(synthetic_clip(5, (160, 120))):
        write_image(tmp_path / f"{i:04}.png", frame)
    document = run(
        capsys, "speed", str(exported), "--backend", "onnxruntime", "--threads", "1", "--seconds", "0.6",
        "--clip", str(tmp_path), "--box", "60,40,40,30", "--peer", "opencv:MIL", "--output", str(tmp_path / "report"),
    )  # fmt: skip
    name = f"{exported}, onnxruntime"
    seen = {(r["protocol"], r["case"]["name"]) for r in document["rows"]}
    assert seen == {("P1, P2", name), ("P5", name), ("P5", "opencv:MIL"), ("P6", name)}
    assert all(r["machine"]["cpu"] and r["latency"]["median"] > 0 for r in document["rows"])
    assert document["paper"][0]["published"] == 81
    assert [(r["protocol"], r["name"]) for r in document["ratios"]] == [("P5", "opencv:MIL")]
    assert any("peak rate, 1 threads" in k for k in document["values"])
    assert "opencv:MIL" in (tmp_path / "report" / "report.md").read_text()


def test_a_model_against_itself_and_the_reference_form(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    both = (str(exported), str(exported))
    document = run(capsys, "ab", *both, "--threads", "1", "--seconds", "2", "--reference")
    assert [r["base"] for r in document["ratios"]] == ["reference form, PyTorch"] * 2
    assert [r["name"] for r in document["ratios"]] == [str(exported), f"{exported} again"]
    # The small model is compared with the whole T, as its manifest says it is one.
    assert all(r["low"] <= r["speedup"] <= r["high"] and r["speedup"] > 1 for r in document["ratios"])


def test_what_cannot_be_here_is_left_out_and_named(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    backends = "onnxruntime,onnxruntime-tensorrt"
    document = run(capsys, "ab", str(exported), "--backend", backends, "--threads", "1", "--seconds", "0.2")
    assert [r["case"]["name"] for r in document["rows"]] == ["onnxruntime"]
    assert any(m.startswith("onnxruntime-tensorrt was left out: ") for m in document["messages"])


def test_targets(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(capsys, "targets", str(exported), "--counts", "1,3", "--seconds", "1", "--threads", "1")
    assert [r["case"]["batch"] for r in document["rows"]] == [1, 1, 3, 3]
    assert all(r["values"]["ms per target"] > 0 for r in document["rows"])


def test_profile(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = run(capsys, "profile", str(exported))["layers"]
    assert len(layers) > 20 and any("Conv" in e["operator"] for e in layers)
    assert all(e["milliseconds"] >= 0 for e in layers)


def test_startup_in_a_fresh_process(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = run(capsys, "startup", str(exported), "--runs", "1", "--threads", "1")["rows"][0]
    assert row["values"]["load (s)"] > 0 and row["values"]["peak RSS (MB)"] > 30
    assert "torch was not imported" in row["notes"]


def test_energy_by_rail(exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from asymtrack_edge.benchmarks.speed import energy

    monkeypatch.setattr(energy, "find_sensors", lambda gpu: {"test": lambda: {"VDD_IN": 2000.0}})
    monkeypatch.setattr(energy, "IDLE_SECONDS", 0.4)
    paced, flat = run(capsys, "energy", str(exported), "--seconds", "0.5", "--threads", "1")["rows"]
    assert paced["case"]["name"].endswith(", 30 fps") and flat["case"]["name"].endswith(", flat out")
    assert paced["values"]["VDD_IN (W)"] == pytest.approx(2)
    assert flat["values"]["VDD_IN (J/frame)"] == pytest.approx(2 / flat["fps"])


def test_report_of_two_files(report: Report, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(report.document()))
    both = run(capsys, "report", str(file), str(file))
    assert len(both["rows"]) == 2 * len(report.rows)


def test_published_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--published"]) == 0
    text = capsys.readouterr().out
    assert "AsymTrack-B" in text and "MixFormer-L" in text and "Table 5b" in text
