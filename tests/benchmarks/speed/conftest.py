"""A small exported model, and a report's document, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace
from pathlib import Path
from typing import Any, Dict

import pytest

from asymtrack_edge.benchmarks.speed.facts import Conditions, Facts
from asymtrack_edge.benchmarks.speed.profile import Layer
from asymtrack_edge.benchmarks.speed.ratios import judge
from asymtrack_edge.benchmarks.speed.report.document import layer_entries, make_document
from asymtrack_edge.benchmarks.speed.rows import Findings, Row
from asymtrack_edge.benchmarks.speed.subjects import Subject
from asymtrack_edge.benchmarks.speed.timing import summarise


@pytest.fixture(scope="session")
def exported(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """An export of the smallest model, batch axis free up to 4, made-up weights."""
    from asymtrack_edge.export.pipeline import ExportOptions, write_models
    from tests.helpers import SMALL, filled_model

    folder = tmp_path_factory.mktemp("exported")
    manifest = write_models(filled_model(SMALL), ExportOptions(max_batch=4), folder)
    replace(manifest, provenance={**manifest.provenance, "weights": "random, seed 0"}).save(folder)
    return folder


@pytest.fixture()
def document() -> Dict[str, Any]:
    """A document with a row of every kind and a name that wants escaping."""
    facts = Facts(
        "Test CPU", 4, 16000, None, None, "Test GPU", "8.7", "1.2", "Linux", "6.1", None, None, None, None, "0.1.0",
        "3.11", {"numpy": "2.0"},
    )  # fmt: skip
    cool, warm = Conditions({"CPU": 40.0}, 3000.0, None, 0.1), Conditions({"CPU": 55.0}, 2900.0, None, 0.9)
    graph = Subject("onnxruntime", "AsymTrack-T", "onnxruntime", "graph", threads=2, multiply_adds=617_000_000)
    odd = Subject("<peer> & co|x", "peer", "opencv", "library", precision="")
    latency = summarise([0.010, 0.011, 0.012, 0.013])
    samples = (10.0, 11.0, 12.0, 13.0)

    def row(protocol: str, subject: Subject, **figures: Any) -> Row:
        return Row(protocol, subject, facts, cool, warm, **{"latency": None, "fps": None, **figures})

    rows = [
        row("P1", graph, latency=latency, fps=87.0, share_of_peak=0.5, samples=samples),
        row("P2", graph, latency=latency, fps=87.0, samples=samples, notes=("a note",)),
        row("P2", replace(graph, threads=1, name="onnxruntime (1 thread)"), latency=latency, fps=50.0),
        row("P2", replace(graph, batch=4, name="onnxruntime (4 targets)"), latency=latency, fps=99.0),
        row("P5", odd, latency=latency, fps=80.0, samples=samples),
        row("P5", graph, latency=latency, fps=80.0, stages={"crop": 0.3, "infer": 11.0}, samples=samples),
        row("P6", graph, latency=latency, fps=60.0, stages={"infer": 11.0, "decode": 4.0, "crop": 0.3}),
        row("P8", graph, fps=30.0, values={"VDD_IN (J/frame)": 0.25}),
        row("startup", graph, values={"load (s)": 0.2}),
    ]
    found = Findings(rows, [("P2", judge("onnxruntime", "<peer> & co|x", (2.0, 1.5, 2.6), 9))], {"peak": 50.0}, ["hm"])
    layers = layer_entries("m", [Layer("Conv", "stem", 1.5), Layer("Gelu", "act", 0.5)])
    beside = {"table": "1, 2", "what": "fps", "name": "onnxruntime", "measured": 87.0, "published": 81.0, "ratio": 1.07,
              "paper_device": "p", "device": "d", "same_device": False}  # fmt: skip
    return make_document(found, "asymtrack-bench speed", layers, [beside])
