"""The paper's tables, and which of their columns to look at."""

from __future__ import annotations

import pytest

from asymtrack_edge.benchmarks import paper


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
        (None, "Xavier", "Jetson-AGX", "cuda:0", ("agx", True)),
        (None, "Xavier", "Jetson-AGX", "cpu", ("agx", False)),
        (None, "Orin", "NVIDIA Jetson AGX Orin Developer Kit", "cuda:0", ("agx", False)),
    ],
)
def test_the_column_to_compare_with(cpu, gpu, board, device, expected):
    assert paper.column_for({"cpu": cpu, "gpu": gpu, "board": board}, device) == expected
