"""A small exported model, and a report, for the tests of this folder."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asymtrack_edge.benchmarks.speed.race import Case, compare, summarise
from asymtrack_edge.benchmarks.speed.report import NETWORK, Report

#: ``machine.facts`` of a made-up machine.
PC = {
    "cpu": "Test CPU", "cores": 4, "board": None, "virtual_machine": False, "gpu": "Test GPU",
    "compute_capability": "8.7", "driver": "1.2", "os": "Linux", "l4t": None, "power_mode": None,
    "asymtrack_edge": "0.1.0", "python": "3.11", "versions": {"numpy": "2.0"},
}  # fmt: skip


@pytest.fixture(scope="session")
def exported(tmp_path_factory):
    """An export of the smallest model, batch axis free up to 4, made-up weights."""
    from asymtrack_edge.export.pipeline import Export, ExportOptions
    from tests.helpers import SMALL, filled_model

    folder = tmp_path_factory.mktemp("exported")
    manifest = Export(filled_model(SMALL), ExportOptions(max_batch=4)).write(folder)
    replace(manifest, provenance={**manifest.provenance, "weights": "random, seed 0"}).save(folder)
    return folder


def row(protocol, case, **figures):
    """A row as ``protocols.Bench.add`` makes it."""
    state = {"temperatures": {"CPU": 40.0}, "cpu_mhz": 3000.0, "gpu_mhz": None, "load": 0.1}
    hot = {**state, "temperatures": {"CPU": 55.0}}
    made = {"protocol": protocol, "case": case.facts(), "machine": PC, "before": state, "after": hot, "latency": None}
    return {**made, "fps": None, "stages": {}, "values": {}, "notes": list(case.notes), **figures}


@pytest.fixture
def report():
    """A report with a row of every kind and a name that wants escaping."""
    net = Case("onnxruntime", None, tracker="AsymTrack-T", backend="onnxruntime", threads=2, notes=("a note",))
    odd = Case("peer|x", None, tracker="peer", backend="opencv", precision="")
    latency = summarise([0.010, 0.011, 0.012, 0.013])
    rows = [
        row(NETWORK, net, latency=latency, fps=87.0),
        row("P5", odd, latency=latency, fps=80.0),
        row("P6", net, latency=latency, fps=60.0, stages={"infer": 11.0, "decode": 4.0, "crop": 0.3}),
        row("P8", net, fps=30.0, values={"VDD_IN (J/frame)": 0.25}),
        row("startup", net, values={"load (s)": 0.2}),
    ]
    beside = {"table": "1, 2", "what": "fps", "name": "onnxruntime", "measured": 87.0, "published": 81.0, "ratio": 1.07,
              "paper_machine": "p", "machine": "d", "same_machine": False}  # fmt: skip
    layers = [{"model": "m", "operator": "Conv", "name": "stem", "milliseconds": 1.5}]
    ratios = compare("P2", {"peer|x": [[v] for v in (1.5, 1.8, 2.0, 2.2, 2.6)], "onnxruntime": [[1.0]] * 5}, "peer|x")
    return Report("asymtrack-bench speed T", rows, ratios, layers, [beside], ["hm"])
