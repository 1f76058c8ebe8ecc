"""The document and what is made from it."""

from __future__ import annotations

import copy
import csv
import io
import json
import re
from html.parser import HTMLParser
from pathlib import Path
from typing import Any, Dict, List

import pytest

from asymtrack_edge.benchmarks.speed.report.document import load_document, merge, save_document
from asymtrack_edge.benchmarks.speed.report.folder import write_report
from asymtrack_edge.benchmarks.speed.report.schema import SCHEMA, violations
from asymtrack_edge.benchmarks.speed.report.tables import as_csv, as_markdown, as_text
from asymtrack_edge.errors import UsageError


def test_document_fits_the_schema(document: Dict[str, Any]) -> None:
    assert list(violations(document, SCHEMA)) == []


def test_schema_by_jsonschema(document: Dict[str, Any]) -> None:
    jsonschema = pytest.importorskip("jsonschema")
    jsonschema.Draft202012Validator.check_schema(SCHEMA)
    jsonschema.validate(document, SCHEMA)
    with pytest.raises(jsonschema.ValidationError):
        jsonschema.validate({**document, "rows": [{}]}, SCHEMA)


@pytest.mark.parametrize(
    ("path", "value", "words"),
    [
        (("version",), 2, "version is 2"),
        (("rows", 0, "protocol"), "P9", "not one of"),
        (("rows", 0, "fps"), "fast", "is str, not number or null"),
        (("rows", 0, "subject", "batch"), 0, "less than 1"),
        (("rows", 0, "subject", "batch"), True, "is bool"),
        (("rows", 0, "latency"), {"mean": 1}, "fits no alternative"),
        (("rows", 0, "device", "cpu"), 5, "device.cpu is int"),
        (("rows", 0, "stages", "crop"), None, "stages.crop is NoneType"),
        (("surprise",), 1, "unknown 'surprise'"),
        (("ratios", 0, "verdict"), "great", "ratios[0].verdict"),
    ],
)
def test_what_the_schema_refuses(document: Dict[str, Any], path: tuple, value: Any, words: str) -> None:
    broken = copy.deepcopy(document)
    place: Any = broken
    for key in path[:-1]:
        place = place[key]
    place[path[-1]] = value
    assert any(words in v for v in violations(broken, SCHEMA))


def test_missing_keys_are_named(document: Dict[str, Any]) -> None:
    del document["rows"][0]["device"]["cpu"]
    assert "document.rows[0].device has no 'cpu'" in list(violations(document, SCHEMA))


def test_saved_and_loaded(document: Dict[str, Any], tmp_path: Path) -> None:
    save_document(document, tmp_path / "a.json")
    assert load_document(tmp_path / "a.json") == document
    both = merge([document, document])
    assert len(both["rows"]) == 2 * len(document["rows"]) and list(violations(both, SCHEMA)) == []
    with pytest.raises(UsageError):
        merge([])
    with pytest.raises(UsageError, match="no folder"):
        save_document(document, tmp_path / "none" / "a.json")


@pytest.mark.parametrize(
    ("text", "words"),
    [("{", "no JSON"), ("[]", "not written by"), ('{"format": "x"}', "not written by"),
     ('{"format": "asymtrack-edge-benchmark", "version": 99}', "has version 99"),
     ('{"format": "asymtrack-edge-benchmark", "version": 1}', "damaged")],
)  # fmt: skip
def test_files_that_are_no_documents(tmp_path: Path, text: str, words: str) -> None:
    (tmp_path / "a.json").write_text(text)
    with pytest.raises(UsageError, match=words):
        load_document(tmp_path / "a.json")
    with pytest.raises(UsageError, match="cannot read"):
        load_document(tmp_path / "b.json")


def test_csv_has_every_row_with_its_device(document: Dict[str, Any]) -> None:
    rows = list(csv.DictReader(io.StringIO(as_csv(document))))
    assert len(rows) == len(document["rows"])
    assert rows[0]["latency.median"] == "11.5" and rows[0]["device.gpu"] == "Test GPU"
    assert rows[0]["before.temperatures.CPU"] == "40.0" and rows[0]["subject.threads"] == "2"
    assert "samples" not in rows[0]


def test_text_and_markdown(document: Dict[str, Any]) -> None:
    text, page = as_text(document), as_markdown(document)
    for words in ("device: Test CPU, 4 cores, Test GPU", "P8", "J/frame", "too wide", "note: hm", "peak: 50"):
        assert words in text
    assert "by how much is uncertain" in page and "<peer> & co\\|x" in page
    for table in re.findall(r"(?:^\|.*\n)+", page, re.MULTILINE):
        widths = {len(re.findall(r"(?<!\\)\|", line)) for line in table.splitlines()}
        assert len(widths) == 1, table


class _Page(HTMLParser):
    """Checks that tags are closed and notes what is loaded from elsewhere."""

    def __init__(self) -> None:
        super().__init__()
        self.open: List[str] = []
        self.sources: List[str] = []

    def handle_starttag(self, tag: str, attrs: Any) -> None:
        if tag not in ("meta", "img", "br", "link"):
            self.open.append(tag)
        self.sources += [value for name, value in attrs if name in ("src", "href")]

    def handle_endtag(self, tag: str) -> None:
        assert self.open.pop() == tag


def test_report_folder(document: Dict[str, Any], tmp_path: Path) -> None:
    pytest.importorskip("matplotlib")
    files = {path.name for path in write_report(document, tmp_path / "new" / "report")}
    assert files == {
        "report.json", "rows.csv", "report.md", "report.html", "speed-accuracy.svg", "latency.svg", "stages.svg",
        "targets.svg", "threads.svg",
    }  # fmt: skip
    folder = tmp_path / "new" / "report"
    assert json.loads((folder / "report.json").read_text()) == document
    page = _Page()
    text = (folder / "report.html").read_text(encoding="utf-8")
    page.feed(text)
    assert not page.open
    assert len(page.sources) == 5 and all(s.startswith("data:image/svg+xml;base64,") for s in page.sources)
    assert "&lt;peer&gt; &amp; co|x" in text and "<peer>" not in text


def test_report_without_matplotlib(document: Dict[str, Any], tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setitem(__import__("sys").modules, "matplotlib", None)
    files = {path.name for path in write_report(document, tmp_path)}
    assert files == {"report.json", "rows.csv", "report.md", "report.html"}
    assert "asymtrack-edge[bench]" in (tmp_path / "report.html").read_text()


def test_a_report_folder_that_cannot_be_made(document: Dict[str, Any], tmp_path: Path) -> None:
    (tmp_path / "file").write_text("")
    with pytest.raises(UsageError, match="cannot make the folder"):
        write_report(document, tmp_path / "file" / "report")
