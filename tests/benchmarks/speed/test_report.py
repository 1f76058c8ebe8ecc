"""The report as JSON and as a page."""

from __future__ import annotations

import json
import re
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
        "peak: 50", "too wide", "faster", "40 to 55", "3000 to 3000", "a note", "peer\\|x", "Layers of m", "stem",
    ):  # fmt: skip
        assert words in page, words
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        lines = table.splitlines()
        assert len({len(re.findall(r"(?<!\\)\|", line)) for line in lines}) == 1, table
        assert len({len(line) for line in lines}) == 1, table


def test_a_folder(report: Report, tmp_path: Path) -> None:
    folder = tmp_path / "new" / "report"
    report.write(folder)
    assert Report.load(folder / "report.json").rows == report.document()["rows"]
    assert (folder / "report.md").read_text() == report.markdown()
