"""The paper's tables, and what is set beside them."""

from __future__ import annotations

import pytest

from asymtrack_edge.benchmarks import paper
from asymtrack_edge.benchmarks.speed.report import NETWORK

PC = {"cpu": "Test CPU", "cores": 4, "board": None, "virtual_machine": False, "gpu": None, "power_mode": None}
I7 = {**PC, "cpu": "Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz"}


def test_figures_of_the_page_are_those_that_are_compared():
    rows = [[cell.strip() for cell in line.strip("|").split("|")] for line in paper.tables().splitlines()]
    for name, speeds in paper.TABLE_1.items():
        one, two, _ = (row for row in rows if row[0] == f"AsymTrack-{name}")
        assert one[3:6] == two[-3:] == list(map(str, speeds.values()))
    for label, (_, speeds) in paper.TABLE_4.items():
        assert [row[1:4] for row in rows if row[0] == label] == [list(map(str, speeds.values()))]


@pytest.mark.parametrize(
    ("cpu", "gpu", "board", "device", "expected"),
    [
        ("Intel(R) Core(TM) i7-9700KF CPU @ 3.60GHz", None, None, "cpu", ("cpu", True)),
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


def network(name, fps, machine=I7, protocol=NETWORK, tracker="AsymTrack-T", batch=1):
    case = {"name": name, "tracker": tracker, "batch": batch, "device": "cpu"}
    return {"protocol": protocol, "case": case, "fps": fps, "machine": machine}


def test_measured_beside_published():
    rows = [network("x", 162.0), network("y", 40.5, PC), network("z", 1.0, batch=4), network("w", 1.0, protocol="P5")]
    lines = paper.beside_table_1(rows)
    found = [(x["measured"], x["published"], x["ratio"], x["same_machine"]) for x in lines]
    assert found == [(162.0, 81, 2.0, True), (40.5, 81, 0.5, False)]
    rows = [network(label, 1.0, tracker="AsymTrack-S") for label in paper.TABLE_4]
    ratios = [{"name": r["case"]["name"], "speedup": speedup} for r, speedup in zip(rows, (1.3, 1.1, 1.2))]
    lines = paper.beside_table_4(rows, ratios)
    assert [x["measured"] for x in lines] == [1.3, 1.1, 1.2, 1.0]
    assert [x["published"] for x in lines] == pytest.approx([95 / 75, 80 / 75, 86 / 75, 1])
    stages = [(variant.etm_stages, variant.ope_stages) for variant, _ in paper.TABLE_4.values()]
    assert stages == [((), ()), ((2, 3), ()), ((), (1, 2, 3)), ((2, 3), (1, 2, 3))]
