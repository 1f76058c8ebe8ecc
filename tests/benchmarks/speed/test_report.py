"""The report as JSON and as a page."""

from __future__ import annotations

import json
import re
import sys
from pathlib import Path

import pytest

from asymtrack_edge.benchmarks.speed.report import Report
from asymtrack_edge.errors import UsageError


def test_written_and_read_again(report: Report, tmp_path: Path) -> None:
    file = tmp_path / "a.json"
    file.write_text(json.dumps(report.document()))
    again = Report.load(file)
    assert again.document() == report.document()
    both = Report.merge([again, report])
    assert len(both.rows) == 2 * len(report.rows) and both.messages == ["hm"]


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "not written by"), ("[]", "not written by"), ('{"format": "x"}', "not written by"),
     ('{"format": "asymtrack-edge-benchmark", "version": 99}', "has version 99"),
     ('{"format": "asymtrack-edge-benchmark", "version": 2, "surprise": 1}', "damaged")],
)  # fmt: skip
def test_files_that_are_no_reports(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        Report.load(tmp_path / "a.json")
    with pytest.raises(UsageError, match="cannot read"):
        Report.load(tmp_path / "b.json")


def test_the_page_has_every_figure_with_its_conditions(report: Report) -> None:
    page = report.markdown()
    for words in (
        "Test CPU, 4 cores, Test GPU, compute capability 8.7", "numpy 2.0", "P8: joules", "VDD_IN (J/frame)", "> hm",
        "peak: 50", "too wide", "faster*", "40 to 55", "3000 to 3000", "a note", "peer\\|x", "Layers of m", "stem",
    ):  # fmt: skip
        assert words in page, words
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        lines = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table
        assert len({len(line) for line in lines}) == 1, table


def test_a_folder_with_the_plot(report: Report, tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    folder = tmp_path / "new" / "report"
    report.write(folder)
    assert {path.name for path in folder.iterdir()} == {"report.json", "report.md", "speed-accuracy.svg"}
    assert Report.load(folder / "report.json").rows == report.document()["rows"]
    assert "](speed-accuracy.svg)" in (folder / "report.md").read_text()
    assert b"<svg" in (folder / "speed-accuracy.svg").read_bytes()


def test_a_folder_without_matplotlib(report: Report, tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(sys.modules, "matplotlib.figure", None)
    report.write(tmp_path)
    assert {path.name for path in tmp_path.iterdir()} == {"report.json", "report.md"}
    assert "asymtrack-edge[bench]" in (tmp_path / "report.md").read_text()
