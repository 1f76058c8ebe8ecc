"""``make gpu-check`` without a GPU: the checks can be listed, and a report is written even if checks fail."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any
from unittest.mock import Mock

import pytest

from tests.gpu import check as gpu_check
from tests.gpu import machine as gpu_machine
from tests.gpu.check import CHECKS, Check
from tests.gpu.machine import Machine

nothing = Mock(side_effect=RuntimeError("there is no GPU here"))


def test_the_dry_run_lists_every_check(capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(gpu_machine, "find_gpu", nothing)
    assert gpu_check.main(["--dry"]) == 0
    lines = capsys.readouterr().out.splitlines()
    assert lines[0] == "no GPU: there is no GPU here"
    assert [line for line in lines[1:] if line.startswith("cannot run") and "there is no GPU here" in line] == lines[1:]
    assert len(lines) == len(CHECKS) + 1


def test_a_report_is_written_even_if_checks_fail(tmp_path: Path, capsys: Any, monkeypatch: Any) -> None:
    def fails(machine: Machine) -> str:
        raise AssertionError("it leaks")

    checks = (Check("good", lambda machine: "fine", ()), Check("bad", fails, ()), Check("absent", fails, ("gpu",)))
    monkeypatch.setattr(gpu_check, "CHECKS", checks)
    monkeypatch.setattr(gpu_machine, "find_gpu", nothing)
    assert gpu_check.main(["--json", str(tmp_path / "report.json")]) == 1
    report = json.loads((tmp_path / "report.json").read_text())
    assert [(c["name"], c["result"], c["detail"]) for c in report["checks"]] == [
        ("good", "passed", "fine"),
        ("bad", "failed", "AssertionError: it leaks"),
        ("absent", "not run", "there is no GPU here"),
    ]
