"""The paper's tables, spot by spot, and what is set beside them."""

from __future__ import annotations

import pytest

from asymtrack_edge.benchmarks import paper
from asymtrack_edge.benchmarks.speed.race import Case
from asymtrack_edge.benchmarks.speed.report import NETWORK
from tests.benchmarks.speed.conftest import PC, row

I7 = {**PC, "cpu": "Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz"}


def test_tables_spot_checks():
    assert paper.TABLE_1["T"] == (224, 81, 84)
    assert len(paper.TABLE_2) == 24 and len(paper.TABLE_3) == 21 and len(paper.TABLE_4) == 4
    assert {len(t) for t in paper.TABLE_2} == {13}
    by_name = {t[0]: t[1:] for t in paper.TABLE_2}
    assert by_name["HiT-Base"][3:6] == (64.6, 73.3, 68.1) and by_name["HiT-Base"][-3:] == (175, 33, 61)
    assert by_name["OSTrack-256"][:3] == (71.0, 80.4, 68.2) and by_name["MixFormer-L"][-3:] == (18, None, None)
    assert all(by_name[f"AsymTrack-{name}"][-3:] == speeds for name, speeds in paper.TABLE_1.items())
    # Real time is 20 frames per second on the AGX Xavier (the paper's criterion): the table's upper part.
    assert [t[0] for t in paper.TABLE_2 if (t[-1] or 0) >= 20] == [t[0] for t in paper.TABLE_2[:14]]
    assert {t[0]: t for t in paper.TABLE_3}["AsymTrack-S"][2] == 65.6
    assert [c.speeds for c in paper.TABLE_4] == [(260, 95, 100), (220, 80, 82), (240, 86, 92), (200, 75, 78)]
    assert paper.TABLE_5A[1] == ("DTM -> MHCA", 64.1, 62.6) and paper.TABLE_5B[3][2] == 61.4


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
def test_the_column_to_compare_with(cpu, gpu, board, device, expected):
    assert paper.column_for({"cpu": cpu, "gpu": gpu, "board": board}, device) == expected


def network(name, fps, machine=I7, protocol=NETWORK, **more):
    case = Case(name, None, tracker=more.pop("tracker", "AsymTrack-T"), **more)
    return row(protocol, case, fps=fps, machine=machine)


def test_measured_beside_table_1():
    rows = [network("x", 162.0), network("y", 40.5, PC), network("z", 1.0, batch=4), network("w", 1.0, protocol="P5")]
    lines = paper.beside_table_1(rows)
    found = [(x["measured"], x["published"], x["ratio"], x["same_machine"]) for x in lines]
    assert found == [(162.0, 81, 2.0, True), (40.5, 81, 0.5, False)]
    assert lines[1]["machine"].startswith("Test CPU") and "i7-9700KF" in lines[1]["paper_machine"]


def test_table_4_in_ratios():
    rows = [network(c.label, 1.0, tracker="AsymTrack-S") for c in paper.TABLE_4]
    ratios = [{"name": r["case"]["name"], "speedup": speedup} for r, speedup in zip(rows, (1.3, 1.1, 1.2))]
    lines = paper.beside_table_4(rows, ratios)
    assert [x["measured"] for x in lines] == [1.3, 1.1, 1.2, 1.0]
    assert [x["published"] for x in lines] == pytest.approx([95 / 75, 80 / 75, 86 / 75, 1])
    stages = [(c.variant.etm_stages, c.variant.ope_stages) for c in paper.TABLE_4]
    assert stages == [((), ()), ((2, 3), ()), ((), (1, 2, 3)), ((2, 3), (1, 2, 3))]
