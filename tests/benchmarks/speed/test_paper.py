"""The paper's tables, spot by spot, and what is set beside them."""

from __future__ import annotations

from dataclasses import replace

import pytest

from asymtrack_edge.benchmarks import paper
from asymtrack_edge.benchmarks.speed import against_paper
from asymtrack_edge.benchmarks.speed.facts import Conditions, Facts
from asymtrack_edge.benchmarks.speed.ratios import judge
from asymtrack_edge.benchmarks.speed.rows import Findings, Row
from asymtrack_edge.benchmarks.speed.subjects import Subject
from asymtrack_edge.errors import UsageError

NOTHING = Conditions({}, None, None, None)
PC = Facts(
    "Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz", 8, 32000, None, False, None, None, None, "Linux", "6", None, None,
    None, None, "0", "3.11", {},
)  # fmt: skip


def test_tables_spot_checks() -> None:
    assert paper.TABLE_1["T"].speeds == (224, 81, 84) and paper.TABLE_1["B"].input_sizes == (192, 384)
    assert len(paper.TABLE_2) == 24 and len(paper.TABLE_3) == 21 and len(paper.TABLE_4) == 4
    hit = paper.published("HiT-Base")
    assert hit.lasot == (64.6, 73.3, 68.1) and hit.speeds == (175, 33, 61) and hit.real_time
    assert paper.published("OSTrack-256").got10k == (71.0, 80.4, 68.2)
    assert paper.published("mixformer-l").speeds == (18, None, None)
    assert {t.tracker: t for t in paper.TABLE_3}["AsymTrack-S"].uav123 == 65.6
    assert [c.speeds for c in paper.TABLE_4] == [(260, 95, 100), (220, 80, 82), (240, 86, 92), (200, 75, 78)]
    assert paper.TABLE_5A[1] == ("DTM -> MHCA", 64.1, 62.6) and paper.TABLE_5B[3].lasot_auc == 61.4
    with pytest.raises(UsageError, match="has no 'nobody'"):
        paper.published("nobody")


def test_tables_agree_with_each_other() -> None:
    for name, configuration in paper.TABLE_1.items():
        assert paper.published(f"AsymTrack-{name}").speeds == configuration.speeds
    # Real time is 20 frames per second on the AGX Xavier (the paper's criterion).
    for row in paper.TABLE_2:
        if row.speeds.agx is not None:
            assert row.real_time == (row.speeds.agx >= 20), row.tracker
    for key in paper.DEVICES:
        assert against_paper.published_order(key) == [1, 3, 2, 4]


@pytest.mark.parametrize(
    ("cpu", "gpu", "board", "on_gpu", "expected"),
    [
        ("Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz", None, None, False, ("cpu", True)),
        ("AMD EPYC", None, None, False, ("cpu", False)),
        ("AMD EPYC", "NVIDIA GeForce RTX 2080 Ti", None, True, ("gpu", True)),
        ("AMD EPYC", "NVIDIA GeForce RTX 4090", None, True, ("gpu", False)),
        (None, "Xavier", "Jetson-AGX Xavier", True, ("agx", True)),
        (None, "Xavier", "Jetson-AGX Xavier", False, ("agx", False)),
        (None, "Orin", "NVIDIA Jetson AGX Orin Developer Kit", True, ("agx", False)),
        (None, None, None, False, ("cpu", False)),
    ],
)
def test_the_column_to_compare_with(cpu, gpu, board, on_gpu, expected) -> None:
    assert paper.column_for(cpu, gpu, board, on_gpu) == expected


def p1(name: str, fps: float, facts: Facts = PC, tracker: str = "AsymTrack-T") -> Row:
    return Row("P1", Subject(name, tracker, "onnxruntime", "graph"), facts, NOTHING, NOTHING, None, fps)


def test_measured_beside_table_1() -> None:
    same, other = p1("x", 162.0), p1("x", 40.5, replace(PC, cpu="Another CPU"))
    batch = replace(same, subject=replace(same.subject, batch=4))
    lines = against_paper.beside_tables_1_and_2([same, other, batch, replace(same, protocol="P5")])
    assert [(x["measured"], x["published"], x["ratio"], x["same_device"]) for x in lines] == [
        (162.0, 81, 2.0, True),
        (40.5, 81, 0.5, False),
    ]
    assert lines[1]["device"].startswith("Another CPU") and "i7-9700KF" in lines[1]["paper_device"]


def test_table_4_in_ratios() -> None:
    rows = [p1(f"graph {c.label}", 1.0, tracker="AsymTrack-S") for c in paper.TABLE_4]
    speeds = {1: 1.3, 2: 1.1, 3: 1.2}
    ratios = [("P2", judge(rows[n - 1].subject.name, rows[3].subject.name, (s, s, s), 9)) for n, s in speeds.items()]
    found = Findings(rows=rows, ratios=ratios)
    assert against_paper.speed_order(found) == [1, 3, 2, 4]
    assert "the paper's order too" in against_paper.order_sentence(found, "graph")
    lines = against_paper.beside_table_4(found)
    assert [x["measured"] for x in lines] == [1.3, 1.1, 1.2, 1.0]
    assert lines[0]["published"] == pytest.approx(95 / 75)
    slower = Findings(rows=rows, ratios=[ratios[0], ("P2", replace(ratios[1][1], speedup=1.25)), ratios[2]])
    assert "the paper's order is 1 > 3 > 2 > 4" in against_paper.order_sentence(slower, "graph")


def test_components_are_the_variants_switches() -> None:
    stages = [(v.etm_stages, v.ope_stages) for v in map(against_paper.component_variant, paper.TABLE_4)]
    assert stages == [((), ()), ((2, 3), ()), ((), (1, 2, 3)), ((2, 3), (1, 2, 3))]


def test_published_text_has_every_table() -> None:
    text = against_paper.published_text()
    assert all(f"Table {n}" in text for n in ("1", "2", "3", "4", "5a", "5b"))
    assert "MixFormer-L" in text and "-" in text
