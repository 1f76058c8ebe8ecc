"""Session options: read as they are written, opened as they say, and raced."""

from __future__ import annotations

import json
from pathlib import Path

import onnxruntime as ort
import pytest

from asymtrack_edge.benchmarks.ab import main
from asymtrack_edge.benchmarks.ab_options import compared, in_one_thread, parse_options, session
from asymtrack_edge.errors import UsageError
from tests.benchmarks.test_ab import write_matmul


def test_options_have_the_types_of_the_attributes() -> None:
    assert parse_options("enable_cpu_mem_arena=false") == {"enable_cpu_mem_arena": False}
    assert parse_options("graph_optimization_level=disable_all, intra_op_num_threads=3") == {
        "graph_optimization_level": ort.GraphOptimizationLevel.ORT_DISABLE_ALL,
        "intra_op_num_threads": 3,
    }
    assert parse_options("session.disable_prepacking=1,execution_mode=Parallel") == {
        "execution_mode": ort.ExecutionMode.ORT_PARALLEL,
        "config": {"session.disable_prepacking": "1"},
    }


@pytest.mark.parametrize(
    ("text", "message"),
    [
        ("enable_mem_pattern", "takes KEY=VALUE"),
        ("enable_mem_pattern=", "takes KEY=VALUE"),
        ("enable_mem_pattern=perhaps", "takes 0, false, 1, true"),
        ("graph_optimization_level=most", "basic, extended"),
        ("intra_op_num_threads=two", "whole number"),
        ("nonsense=1", "no attribute nonsense"),
        ("logid=x", "no attribute logid"),
        ("session.set_denormal_as_zero=1", "whole process"),
    ],
)
def test_mistakes(text: str, message: str) -> None:
    with pytest.raises(UsageError, match=message):
        parse_options(text)


def test_all_that_are_compared_can_be_opened(tmp_path: Path) -> None:
    model = tmp_path / "model.onnx"
    write_matmul(model)
    for text in compared(2):
        chosen = session(str(model), 2, **parse_options(text)).get_session_options()
        for key, value in parse_options(text).items():
            if key == "config":
                assert all(chosen.get_session_config_entry(k) == v for k, v in value.items())
            else:
                assert getattr(chosen, key) == value
    assert set(compared(1)) < set(compared(2))
    assert all(in_one_thread(parse_options(text)) for text in compared(1))
    assert not in_one_thread(parse_options("execution_mode=parallel"))
    assert not in_one_thread(parse_options("intra_op_num_threads=2"))


def test_a_file_that_is_no_model_is_named(tmp_path: Path) -> None:
    path = tmp_path / "model.onnx"
    path.write_text("no model")
    with pytest.raises(UsageError, match=r"cannot open .*model\.onnx"):
        session(str(path), 1)


def test_a_model_races_itself(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    model = tmp_path / "model.onnx"
    write_matmul(model)
    arguments = [str(model), "--seconds", "0.1", "--clock", "cpu", "--json"]
    assert main([*arguments, "--option", "session.disable_prepacking=1", "--compare-options"]) == 0
    names = [row["name"] for row in json.loads(capsys.readouterr().out)["rows"]]
    # Named once, though asked for twice.
    assert names[:2] == [str(model), f"{model}, session.disable_prepacking=1"]
    assert set(names[1:]) == {f"{model}, {text}" for text in compared(1)} and len(names) == 1 + len(compared(1))


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--compare-options", "--reference", "T"], "nothing to time"),
        (["x", "--clock", "cpu", "--option", "execution_mode=parallel"], "start more"),
    ],
)
def test_mistakes_of_the_command(
    arguments: list,  # type: ignore[type-arg]
    message: str,
    capsys: pytest.CaptureFixture[str],
) -> None:
    assert main(arguments) == 2
    assert message in capsys.readouterr().err
