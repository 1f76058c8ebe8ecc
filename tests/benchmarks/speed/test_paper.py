"""The paper's tables, spot by spot, and what is set beside them."""

from __future__ import annotations

from typing import Any, Dict

import pytest

from asymtrack_edge.benchmarks import paper
from asymtrack_edge.benchmarks.speed import against_paper
from asymtrack_edge.benchmarks.speed.race import Case, Step, judge
from asymtrack_edge.benchmarks.speed.report import NETWORK
from tests.benchmarks.speed.conftest import PC, row

I7 = {**PC, "cpu": "Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz"}


def test_tables_spot_checks() -> None:
    assert paper.TABLE_1["T"] == (224, 81, 84)
    assert len(paper.TABLE_2) == 24 and len(paper.TABLE_3) == 21 and len(paper.TABLE_4) == 4
    by_name = {t.tracker: t for t in paper.TABLE_2}
    hit = by_name["HiT-Base"]
    assert hit.lasot == (64.6, 73.3, 68.1) and hit.speeds == (175, 33, 61) and hit.real_time
    assert by_name["OSTrack-256"].got10k == (71.0, 80.4, 68.2) and by_name["MixFormer-L"].speeds == (18, None, None)
    assert {t[0]: t for t in paper.TABLE_3}["AsymTrack-S"][2] == 65.6
    assert [c.speeds for c in paper.TABLE_4] == [(260, 95, 100), (220, 80, 82), (240, 86, 92), (200, 75, 78)]
    assert paper.TABLE_5A[1] == ("DTM -> MHCA", 64.1, 62.6) and paper.TABLE_5B[3][2] == 61.4
    titles = [title.partition(":")[0] for title, _, _ in paper.tables()]
    assert titles == ["Table 1", "Table 2", "Table 3", "Table 4", "Table 5a", "Table 5b"]


def test_tables_agree_with_each_other() -> None:
    for t in paper.TABLE_2:
        # Real time is 20 frames per second on the AGX Xavier (the paper's criterion).
        assert t.speeds.agx is None or t.real_time == (t.speeds.agx >= 20), t.tracker
        if t.tracker.startswith("AsymTrack-"):
            assert t.speeds == paper.TABLE_1[t.tracker[-1]]


@pytest.mark.parametrize(
    ("cpu", "gpu", "board", "device", "expected"),
    [
        ("Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz", None, None, "cpu", ("cpu", True)),
        ("AMD EPYC", None, None, "cpu", ("cpu", False)),
        ("AMD EPYC", "NVIDIA GeForce RTX 2080 Ti", None, "cuda:0", ("gpu", True)),
        ("AMD EPYC", "NVIDIA GeForce RTX 4090", None, "cuda:0", ("gpu", False)),
        (None, "Xavier", "Jetson-AGX Xavier", "cuda:0", ("agx", True)),
        (None, "Xavier", "Jetson-AGX Xavier", "cpu", ("agx", False)),
        (None, "Orin", "NVIDIA Jetson AGX Orin Developer Kit", "cuda:0", ("agx", False)),
        (None, None, None, "cpu", ("cpu", False)),
    ],
)
def test_the_column_to_compare_with(cpu: Any, gpu: Any, board: Any, device: str, expected: Any) -> None:
    assert paper.column_for({"cpu": cpu, "gpu": gpu, "board": board}, device) == expected


def network(name: str, fps: float, machine: Dict[str, Any] = I7, tracker: str = "AsymTrack-T", batch: int = 1) -> Any:
    case = Case(name, Step(lambda: None), tracker, "onnxruntime", batch=batch)
    return row(NETWORK, case, fps=fps, machine=machine)


def test_measured_beside_table_1() -> None:
    rows = [
        network("x", 162.0),
        network("y", 40.5, PC),
        network("z", 1.0, batch=4),
        {**network("w", 1.0), "protocol": "P5"},
    ]
    lines = against_paper.beside_table_1(rows)
    assert [(x["measured"], x["published"], x["ratio"], x["same_machine"]) for x in lines] == [
        (162.0, 81, 2.0, True),
        (40.5, 81, 0.5, False),
    ]
    assert lines[1]["machine"].startswith("Test CPU") and "i7-9700KF" in lines[1]["paper_machine"]


def test_table_4_in_ratios() -> None:
    rows = [network(f"Table 4, {c.label}", 1.0, tracker="AsymTrack-S") for c in paper.TABLE_4]
    base = rows[3]["case"]["name"]
    ratios = [judge(r["case"]["name"], base, [s] * 9) for r, s in zip(rows, (1.3, 1.1, 1.2))]
    lines = against_paper.beside_table_4(rows, ratios)
    assert [x["measured"] for x in lines] == [1.3, 1.1, 1.2, 1.0]
    assert [x["published"] for x in lines] == pytest.approx([95 / 75, 80 / 75, 86 / 75, 1])


def test_components_are_the_variants_switches() -> None:
    stages = [(v.etm_stages, v.ope_stages) for v in map(against_paper.component_variant, paper.TABLE_4)]
    assert stages == [((), ()), ((2, 3), ()), ((), (1, 2, 3)), ((2, 3), (1, 2, 3))]
