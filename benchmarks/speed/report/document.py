"""Findings as one JSON document, and back."""

from __future__ import annotations

import datetime
import json
import os
from dataclasses import asdict
from pathlib import Path
from typing import Any, Dict, List, Sequence

from asymtrack_edge.benchmarks.speed.profile import Layer
from asymtrack_edge.benchmarks.speed.report.schema import FORMAT, SCHEMA, VERSION, violations
from asymtrack_edge.benchmarks.speed.rows import Findings
from asymtrack_edge.errors import UsageError

Document = Dict[str, Any]


def make_document(
    findings: Findings, command: str, layers: Sequence[Dict[str, Any]] = (), paper: Sequence[Dict[str, Any]] = ()
) -> Document:
    """Puts findings into a document as ``SCHEMA`` describes it.

    Args:
        findings: measured.
        command: the command line, so that the figures can be made again.
        layers: of ``layer_entries``.
        paper: lines that set measured beside published figures.
    """
    document = {
        "format": FORMAT,
        "version": VERSION,
        "created": datetime.datetime.now(datetime.timezone.utc).isoformat(timespec="seconds"),
        "command": command,
        "rows": [row.to_dict() for row in findings.rows],
        "ratios": [{"protocol": protocol, **asdict(ratio)} for protocol, ratio in findings.ratios],
        "layers": list(layers),
        "paper": list(paper),
        "values": dict(findings.values),
        "messages": list(findings.messages),
    }
    # Tuples become lists, as they will when the document is read again.
    return json.loads(json.dumps(document, allow_nan=False))  # type: ignore[no-any-return]


def layer_entries(model: str, layers: Sequence[Layer]) -> List[Dict[str, Any]]:
    """Layers as a document holds them."""
    return [{"model": model, **asdict(layer)} for layer in layers]


def save_document(document: Document, path: Path) -> None:
    """Writes a document, completely or not at all.

    Raises:
        UsageError: the folder does not exist.
    """
    write_text(path, json.dumps(document, indent=1) + "\n")


def write_text(path: Path, text: str) -> None:
    """Writes a file beside its place and renames it.

    Raises:
        UsageError: its folder does not exist.
    """
    if not path.parent.is_dir():
        raise UsageError(f"there is no folder {path.parent} to write {path.name} into")
    part = path.with_name(f".{path.name}.part")
    part.write_bytes(text.encode("utf-8"))
    os.replace(part, path)


def load_document(path: Path) -> Document:
    """Reads a document and checks it against the schema.

    Raises:
        UsageError: it cannot be read, is no such document, or of another version.
    """
    try:
        document = json.loads(path.read_text(encoding="utf-8"))
    except OSError as error:
        raise UsageError(f"cannot read {path}: {error.strerror or error}") from None
    except ValueError:
        raise UsageError(f"{path} is no JSON: give a file written by asymtrack-bench --json") from None
    if not isinstance(document, dict) or document.get("format") != FORMAT:
        raise UsageError(f"{path} was not written by asymtrack-bench --json")
    if document.get("version") != VERSION:
        raise UsageError(f"{path} has version {document.get('version')}, this package reads {VERSION}: measure again")
    wrong = next(violations(document, SCHEMA), None)
    if wrong:
        raise UsageError(f"{path} is damaged: {wrong}")
    return document


def merge(documents: Sequence[Document]) -> Document:
    """One document of several: their rows, ratios and the rest one after the other.

    Raises:
        UsageError: there is none.
    """
    if not documents:
        raise UsageError("nothing to report: give files written by asymtrack-bench --json")
    merged = dict(documents[0])
    for key in ("rows", "ratios", "layers", "paper", "messages"):
        merged[key] = [item for d in documents for item in d[key]]
    merged["values"] = {k: v for d in documents for k, v in d["values"].items()}
    merged["command"] = "; ".join(d["command"] for d in documents)
    return merged
