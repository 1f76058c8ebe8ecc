"""The command: mistakes in one line, and small real runs."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, List

import cv2
import pytest

from asymtrack_edge.benchmarks.speed.command import main
from asymtrack_edge.benchmarks.speed.report.schema import SCHEMA, violations
from asymtrack_edge.runtime.sources.clip import synthetic_clip

MISTAKES = [
    (["speed", "--variant", "X"], "unknown variant 'X'"),
    (["speed", "--backend", "abacus"], "unknown backend 'abacus'"),
    (["speed", "--protocol", "P9"], "unknown protocol 'P9'"),
    (["speed", "--precision", "fp7"], "unknown precision"),
    (["speed", "--threads", "two"], "--threads takes whole numbers"),
    (["speed", "--threads", "0"], "at least 1"),
    (["speed", "--threads", "2,0"], "at least 1"),
    (["profile", "--threads", "0"], "at least 1"),
    (["speed", "--batch", "0"], "within 1..64"),
    (["speed", "--seconds", "-1"], "must be positive"),
    (["speed", "--video", "x.mp4"], "go together"),
    (["speed", "--peer", "nobody", "--protocol", "P5"], "--peer takes"),
    (["speed", "--model", "/no/such/folder"], "no export directory"),
    (["speed", "--json", "/no/such/folder/x.json"], "no folder"),
    (["ab", "/no/such/folder"], "needs two candidates"),
    (["targets", "--counts", "0,2"], "within 1..64"),
    (["profile", "--trtexec", "/no/such/file"], "cannot read"),
    (["startup", "--runs", "0"], "at least 1"),
    (["paper", "--table", "3"], "--table takes"),
    (["report", "/no/such/file"], "cannot read"),
]


@pytest.mark.parametrize(("arguments", "words"), MISTAKES)
def test_mistakes_end_in_one_line(arguments: List[str], words: str, capsys: pytest.CaptureFixture[str]) -> None:
    assert main(arguments) == 2
    lines = [line for line in capsys.readouterr().err.splitlines() if not line.startswith("making a")]
    assert len(lines) == 1 and lines[0].startswith("error: ") and words in lines[0]


def test_energy_needs_a_sensor(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from asymtrack_edge.benchmarks.speed import energy

    monkeypatch.setitem(__import__("sys").modules, "jtop", None)
    monkeypatch.setattr(energy, "run_command", lambda command: None)
    monkeypatch.setattr(energy.RaplCounters, "available", False)
    assert main(["energy"]) == 2
    assert "no power sensor" in capsys.readouterr().err


def test_help_has_examples(capsys: pytest.CaptureFixture[str]) -> None:
    with pytest.raises(SystemExit) as ended:
        main(["--help"])
    assert ended.value.code == 0
    text = capsys.readouterr().out
    assert "examples:" in text and "asymtrack-bench speed --variant T" in text


def run(capsys: pytest.CaptureFixture[str], *arguments: str) -> Any:
    assert main([*arguments, "--json"]) == 0
    document = json.loads(capsys.readouterr().out)
    assert list(violations(document, SCHEMA)) == []
    return document


@pytest.fixture()
def sequence(tmp_path: Path) -> Path:
    """A data set of one short sequence, whose frames serve as a video too."""
    folder = tmp_path / "data" / "one"
    folder.mkdir(parents=True)
    boxes = []
    for i, (frame, box) in enumerate(synthetic_clip(5, (160, 120))):
        cv2.imwrite(str(folder / f"{i:04}.png"), frame)
        boxes.append(",".join(map(str, box)))
    (folder / "groundtruth.txt").write_text("\n".join(boxes) + "\n")
    return folder


def test_a_small_speed_run(exported: Path, sequence: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(
        capsys, "speed", "--model", str(exported), "--backend", "onnxruntime", "--threads", "1", "--seconds", "0.6",
        "--video", str(sequence), "--box", "60,40,40,30", "--dataset", f"folder={sequence.parent}",
        "--protocol", "P1,P2,P3,P4,P5,P6,P7", "--peer", f"same={exported}", "--output", str(tmp_path / "report"),
    )  # fmt: skip
    seen = {(r["protocol"], r["subject"]["name"]) for r in document["rows"]}
    assert seen == {
        ("P1", "onnxruntime"), ("P2", "onnxruntime"), ("P3", "onnxruntime host arrays"), ("P3", "same"),
        ("P4", "onnxruntime"), ("P5", "onnxruntime"), ("P5", "same"), ("P6", "onnxruntime"), ("P7", "onnxruntime"),
    }  # fmt: skip
    assert all(r["device"]["cpu"] and r["latency"]["median"] > 0 for r in document["rows"])
    assert document["paper"][0]["published"] == 81
    assert {r["protocol"] for r in document["ratios"]} == {"P3", "P5"}
    assert any("peak rate, 1 threads" in k for k in document["values"])
    assert (tmp_path / "report" / "report.html").stat().st_size > 5000


def test_ab_of_a_model_with_itself(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    document = run(capsys, "ab", str(exported), str(exported), "--threads", "1", "--seconds", "1.5")
    ratio = document["ratios"][0]
    assert ratio["name"] == f"{exported} again" and ratio["base"] == str(exported)
    assert ratio["low"] <= ratio["speedup"] <= ratio["high"]
    assert 0.5 < ratio["speedup"] < 2


def test_targets(exported: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    from asymtrack_edge.benchmarks.speed import models

    monkeypatch.setattr(models, "export_folder", lambda *a, **k: exported)
    document = run(capsys, "targets", "--model", str(exported), "--counts", "1,3", "--seconds", "1", "--threads", "1")
    assert [r["subject"]["batch"] for r in document["rows"]] == [1, 1, 3, 3]
    assert all(r["values"]["ms per target"] > 0 for r in document["rows"])
    assert main(["targets", "--model", str(exported), "--counts", "5"]) == 2
    assert "at most 4 targets" in capsys.readouterr().err


def test_profile(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    layers = run(capsys, "profile", "--model", str(exported))["layers"]
    assert len(layers) > 20 and any("Conv" in e["operator"] for e in layers)
    assert all(e["milliseconds"] >= 0 for e in layers)


def test_startup_in_a_fresh_process(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    row = run(capsys, "startup", "--model", str(exported), "--runs", "1", "--threads", "1")["rows"][0]
    assert row["values"]["load (s)"] > 0 and row["values"]["peak RSS (MB)"] > 30
    assert "torch was not imported" in row["notes"]


def test_startup_passes_on_what_the_child_says(exported: Path, capsys: pytest.CaptureFixture[str]) -> None:
    arguments = ["startup", "--model", str(exported), "--runs", "1", "--backend", "onnxruntime-tensorrt"]
    assert main(arguments) == 2
    assert "Tensorrt" in capsys.readouterr().err


def test_report_of_two_files(exported: Path, tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    file = tmp_path / "a.json"
    arguments = ["speed", "--model", str(exported), "--backend", "onnxruntime", "--protocol", "P2", "--seconds", "0.2"]
    assert main([*arguments, "--json", str(file)]) == 0
    assert "P2" in capsys.readouterr().out
    both = run(capsys, "report", str(file), str(file))
    assert len(both["rows"]) == 2
    lines = run(capsys, "paper", "--from", str(file))["paper"]
    assert lines == []  # P2 is not what the paper reports


def test_published_tables(capsys: pytest.CaptureFixture[str]) -> None:
    assert main(["paper", "--published"]) == 0
    assert "AsymTrack-B" in capsys.readouterr().out
