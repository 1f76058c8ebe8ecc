"""The A/B timing tool."""

from __future__ import annotations

import json
from pathlib import Path
from time import sleep

import pytest

from asymtrack_edge.benchmarks.ab import main, race, report
from asymtrack_edge.benchmarks.contenders import Contender, node_times, peak_contender


def test_a_race_finds_the_faster() -> None:
    slow, fast = Contender("slow", lambda: sleep(0.004)), Contender("fast", lambda: sleep(0.001), 1000)
    race([slow, fast], 0.5)
    assert fast.best >= 0.001 and fast.rate <= 1e6
    first, second = report([slow, fast], None)
    assert first["speedup"] == first["speedup_p10"] == first["speedup_p90"] == 1
    assert 1.3 < second["speedup"] < 6 and second["speedup_p10"] <= second["speedup"] <= second["speedup_p90"]


def test_command(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.onnx"
    write_matmul(model)
    assert main([str(model), str(model), "--seconds", "0.1", "--clock", "cpu", "--json"]) == 0
    figures = json.loads(capsys.readouterr().out)
    assert figures["peak_gmac_s"] > 0.1
    assert [row["name"] for row in figures["rows"]] == [str(model)] * 2
    assert figures["rows"][0]["speedup"] == 1 and figures["rows"][1]["best_ms"] > 0
    assert [operator for operator, _, _ in node_times(model, 1, runs=3)] == ["MatMul"]


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ([], "nothing to time"),
        (["absent"], "no model"),
        (["x", "--clock", "cpu", "--threads", "2"], "adds up"),
        (["--reference", "T", "--threads", "0"], "at least 1"),
    ],
)
def test_mistakes(arguments: list, message: str, capsys: pytest.CaptureFixture[str]) -> None:  # type: ignore[type-arg]
    assert main(arguments) == 2
    assert message in capsys.readouterr().err


def test_peak_rate_is_plausible() -> None:
    peak = peak_contender(1)
    race([peak], 0.05)
    assert 1e8 < peak.rate < 1e13


def write_matmul(path: Path) -> None:
    from onnx import TensorProto, helper

    values = [helper.make_tensor_value_info(n, TensorProto.FLOAT, [16, 16]) for n in ("x", "w", "y")]
    graph = helper.make_graph([helper.make_node("MatMul", ["x", "w"], ["y"])], "g", values[:2], values[2:])
    model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 13)], ir_version=8)
    path.write_bytes(model.SerializeToString())
