"""The checks of ``make gpu-check``, one by one; and, without a GPU, that they can be listed."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any, Iterator

import pytest

from tests.gpu import check as gpu_check
from tests.gpu.check import CHECKS, Check, Machine, ratios


@pytest.fixture(scope="module")
def machine(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Machine]:
    yield Machine(tmp_path_factory.mktemp("models"))


def nothing(index: int) -> Any:
    raise RuntimeError("there is no GPU here")


@pytest.mark.gpu
@pytest.mark.parametrize("check", CHECKS, ids=lambda check: check.name)
def test_check(check: Check, machine: Machine) -> None:
    reason = machine.lacks(check.needs)
    if reason is not None:
        pytest.skip(reason)
    check.run(machine)


def test_the_dry_run_lists_every_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_check, "find_gpu", nothing)
    assert gpu_check.main(["--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no GPU: there is no GPU here"
    assert [line for line in lines[1:] if line.startswith("cannot run") and "there is no GPU here" in line] == lines[1:]
    assert len(lines) == len(CHECKS) + 1


def test_a_report_is_written_whatever_fails(
    tmp_path: Path, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    def fails(machine: Machine) -> str:
        raise AssertionError("it leaks")

    checks = (Check("good", lambda machine: "fine", ()), Check("bad", fails, ()), Check("absent", fails, ("gpu",)))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(gpu_check, "find_gpu", nothing)
    assert gpu_check.main(["--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(c["name"], c["result"], c["detail"]) for c in report["checks"]] == [
        ("good", "passed", "fine"),
        ("bad", "failed", "AssertionError: it leaks"),
        ("absent", "not run", "there is no GPU here"),
    ]


def test_the_aims_and_the_table_of_the_docs_come_from_the_rows(tmp_path: Path, capsys: Any) -> None:
    kind = "onnxruntime-cuda fp16"
    rows = [
        {"what": "reference, eager fp32", "batch": 1, "ms": 8.0, "times_reference": 1.0},
        {"what": "folded, PyTorch CUDA graph fp16", "batch": 1, "ms": 0.5},
        {"what": f"{kind}: search step with crop", "batch": 1, "ms": 0.5, "times_reference": 16.0},
        {"what": f"{kind}: search step with crop", "batch": 32, "ms": 2.0},
        {"what": f"{kind}: update() on host frames", "batch": 1, "ms": 0.7},
        {"what": f"{kind}: update() on device frames", "batch": 1, "failed": "no PyTorch"},
        {"what": "onnxruntime-cuda fp32: search step with crop", "batch": 1, "ms": 0.4},
    ]
    assert {row["measure"]: (row["ratio"], row["met"]) for row in ratios(rows)} == {
        "search step fp16 to reference": (0.062, True),
        "search step fp16 to best candidate": (1.0, True),
        "update() on host frames": (1.4, True),
        "32 targets to one": (4.0, False),
    }
    report = {"gpu": {"name": "NVIDIA H200"}, "date": "2026-12-01", "versions": {"torch": "2.11"}}
    (tmp_path / "report.json").write_text(json.dumps({**report, "checks": [{"name": "speed", "rows": rows}]}))
    assert gpu_check.main(["--table", str(tmp_path / "report.json")]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "| | batch 1 | batch 8 | batch 32 |"
    assert lines[4] == f"| {kind}: search step with crop | 0.500 ms (16.0 x) |  | 2.000 ms (- x) |"
    assert len(lines) == 9 and lines[8].startswith("NVIDIA H200, 2026-12-01; torch 2.11")
